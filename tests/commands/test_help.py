"""Help and a mistyped flag answer without loading what only work needs."""

import json
import subprocess
import sys

import pytest

from deferral_train.cli import COMMANDS

HEAVY = ("torch", "transformers", "pytorch_lightning", "torchmetrics", "pandas", "pyarrow", "scipy", "numpy")
PROGRAM = """
import contextlib, io, json, sys
from deferral_train.cli import main
loaded = {}
for name in json.loads(sys.argv[1]):
    for flag in ("--help", "--no-such-flag"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                code = main([name, flag])
            except SystemExit as stop:
                code = stop.code
        found = [module for module in json.loads(sys.argv[2]) if module in sys.modules]
        loaded[f"{name} {flag}"] = [code, len(said.getvalue().splitlines()), found]
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict:
    names = [name for name in COMMANDS if name != "fit"]  # Lightning's own parser describes the flags of fit
    words = [sys.executable, "-c", PROGRAM, json.dumps(names), json.dumps(HEAVY)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def test_every_command_was_asked(loaded):
    assert len(loaded) == 2 * (len(COMMANDS) - 1)


def test_help_and_a_mistyped_flag_load_nothing_heavy(loaded):
    assert {words: found for words, (_, _, found) in loaded.items() if found} == {}


def test_help_ends_with_zero_and_a_mistyped_flag_with_one_line_and_two(loaded):
    for words, (code, lines, _) in loaded.items():
        assert (code, lines) == ((0, 0) if words.endswith("--help") else (2, 1)), words
