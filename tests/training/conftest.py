"""Trace folders and one short fit that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from training.trace_maker import small_language, write_traces

from deferral_train.training.config import FitConfig
from deferral_train.training.fit import FitResult, fit

FEATURES = ("drafter_max:logit", "verifier_max", "verifier_at_drafter_argmax", "tv", "position:log1p")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root, language = tmp_path_factory.mktemp("traces"), small_language()
    return {
        name: write_traces(root / name, language, sequences, 25, seed)
        for name, sequences, seed in (("train", 120, 1), ("val", 60, 2), ("test", 40, 3))
    }


@pytest.fixture(scope="session")
def config(folders) -> FitConfig:
    return FitConfig(
        train=str(folders["train"]),
        val=str(folders["val"]),
        features=FEATURES,
        hidden=(8,),
        batch_size=256,
        epochs=3,
        lr=0.01,
        figure_every=1,
    )


@pytest.fixture(scope="session")
def fitted(config, tmp_path_factory) -> tuple[FitResult, Path]:
    out = tmp_path_factory.mktemp("fit")
    return fit(config, out), out
