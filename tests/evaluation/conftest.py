"""Traces and a decoded tiny pair that several tests share."""

from __future__ import annotations

import pytest

from deferral_train.traces import Traces
from evaluation.language import VOCABULARY, Language


@pytest.fixture(scope="session")
def language() -> Language:
    return Language()


@pytest.fixture(scope="session")
def traces(language: Language, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Temperature 1, every token logged as a candidate."""
    return language.write(tmp_path_factory.mktemp("traces") / "t1", 1.0, VOCABULARY)


@pytest.fixture(scope="session")
def greedy_traces(language: Language, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Temperature 0."""
    return language.write(tmp_path_factory.mktemp("traces") / "t0", 0.0, VOCABULARY)
