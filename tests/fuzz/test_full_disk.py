"""A full disk in `collect` and `fit`, from some of their changes to the disk on; ``fuzz.full_disk`` tries each one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.full_disk import compiler

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the preloaded library is written for Linux")
@pytest.mark.parametrize(
    ("command", "every", "least"),
    [
        ("collect", 17, 20),
        ("fit", 67, 20),
        pytest.param("fit", 13, 20, marks=pytest.mark.slow),
    ],
)
def test_what_was_there_is_readable_and_a_rerun_finishes(command: str, every: int, least: int) -> None:
    if compiler() is None:
        pytest.skip("needs a C compiler")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    program = [
        sys.executable,
        "-m",
        "fuzz.full_disk",
        "--only",
        command,
        "--every",
        str(every),
        "--first",
        "3",
    ]
    done = subprocess.run(program, env=environment, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    changes, findings = json.loads(done.stdout.strip().splitlines()[-1])[command]
    assert findings == 0
    assert changes >= least
