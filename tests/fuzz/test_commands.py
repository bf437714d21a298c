"""A few seeds of the command fuzzer (fuzz/commands.py), in this process: no traceback, one line of error."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.commands import COMMANDS, make_world, problem

QUICK = tuple(name for name in COMMANDS if name != "run")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_odd_command_lines_and_corrupted_folders_give_one_line(first, world, tmp_path):
    for seed in range(first, first + 10):
        words, wrong = problem(seed, world, tmp_path / "scratch", QUICK)
        assert wrong is None, (seed, words)
