"""The re-translation example as a user runs it: both ways side by side, counts that add up, bad input in one line."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tiny_models import save_tiny_pair
from warm import Warm

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "retranslation" / "retranslate.py"


def run(warm: Warm, *flags: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    words = [warm.python, str(SCRIPT), *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


def test_both_ways_are_counted(tmp_path: Path, warm: Warm) -> None:
    _, verifier = save_tiny_pair("t5", tmp_path)
    (tmp_path / "sources.txt").write_text("w1 w2 w3 w4 w5\nw9 w8 w7 w6\n")
    flags = ("--model", verifier, "--sources", tmp_path / "sources.txt", "--max-new-tokens", 12)
    done = run(warm, *flags, "--bias", 0.0, "--hidden", 0)
    assert done.returncode == 0, done.stderr
    # Without bias the draft only saves passes: the same texts, and so the same erasure.
    scratch, biased = (float(x) for x in re.findall(r"normalised erasure ([\d.]+)", done.stdout))
    assert scratch == biased
    assert "2 of 2 final texts are those from scratch" in done.stdout
    assert float(re.search(r"passes ([\d.]+) times fewer", done.stdout).group(1)) >= 1.0
    assert run(warm, *flags, "--bias", 1.5).stderr.startswith("retranslate: rule biased: bias is 1.5")
