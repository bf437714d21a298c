"""A few seeds of the fuzzer of collect, fit and train-pair: no traceback, one line of error."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.commands_training import COMMANDS, make_world, problem


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", COMMANDS)
def test_odd_command_lines_and_damaged_inputs_give_one_line(command, world, tmp_path):
    for seed in range(6):
        words, wrong = problem(seed, world, tmp_path / "scratch", (command,))
        assert wrong is None, (seed, words)
