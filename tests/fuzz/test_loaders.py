"""Damaged files are refused in one clear line by every loader, however they are damaged (see fuzz/run.py for more)."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
from fuzz.loaders import LOADERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {"yaml": 30, "prompts": 150, "shard": 150, "manifest": 100}


@cache
def seeds(name: str) -> list[bytes]:
    return LOADERS[name].seeds()


@pytest.mark.parametrize("name", LOADERS)
def test_good_files_are_taken_and_odd_ones_refused(name, tmp_path):
    taken = [LOADERS[name](seed, tmp_path) for seed in seeds(name)]
    assert taken[0] is True


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_give_one_clear_line(name):
    loader = LOADERS[name]

    @settings(
        max_examples=EXAMPLES.get(name, 100),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(seeds(name)), st.randoms(use_true_random=True))
    def damaged(seed, random):
        with tempfile.TemporaryDirectory() as folder:
            loader(loader.damage(random, seed), Path(folder))

    damaged()
