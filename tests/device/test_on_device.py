"""Runs the ``suite_*.py`` of this folder in processes of their own, with the pretend accelerator registered.

Run one alone, as any test file: ``pytest tests/device/suite_refusals.py``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from device import pretend_device
from warm import Warm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Two processes: importing transformers and Lightning costs as much as a suite.
ALONE = "suite_decoding.py"
SUITES = {"decoding": [ALONE], "others": sorted(p.name for p in HERE.glob("suite_*.py") if p.name != ALONE)}


@pytest.fixture(scope="session")
def built() -> None:
    """The extension is built; skipped, saying why, where that cannot be."""
    try:
        pretend_device.library()
    except pretend_device.UnavailableError as error:
        pytest.skip(f"no pretend device: {error}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.usefixtures("built")
def test_suite_passes_on_a_second_device(suite: str, warm: Warm) -> None:
    """``-p no:xdist`` and one process: the device is registered before the first backward pass of that process."""
    command = [
        warm.python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--no-header",
    ]
    files = [str(HERE / name) for name in SUITES[suite]]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{suite}:\n{done.stdout[-8000:]}{done.stderr[-2000:]}"
    assert " skipped" not in done.stdout, done.stdout[-2000:]  # this one item stands for all of them
