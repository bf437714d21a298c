"""The serving example as a user runs it: a process that is asked line by line and streams its answers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from heads.distributions import every_head
from tiny_models import save_tiny_pair
from warm import Warm

from deferral_train import load_pair
from deferral_train.heads import DeferralHead
from deferral_train.heads.rules import learned_rule

SERVE = Path(__file__).resolve().parents[2] / "examples" / "serve" / "serve.py"
PROMPTS = ("w1 w2 w3", "w4 w5", "w30 w2 w8 w9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    save_tiny_pair("llama", folder)
    head = every_head()["gap"]
    head.metadata = {"alpha": 0.1}
    head.save_pretrained(folder / "head")
    return folder


def start(warm: Warm, folder: Path, *flags: object) -> subprocess.Popen[str]:
    words = ["--drafter", folder / "drafter", "--verifier", folder / "verifier", *flags]
    return subprocess.Popen(
        [warm.python, str(SERVE), *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )


def test_answers_line_by_line_what_the_pair_generates(folder, warm):
    pair = load_pair(str(folder / "drafter"), str(folder / "verifier"), device="cpu")
    rule = learned_rule(DeferralHead.from_pretrained(folder / "head"))
    wanted = [pair.generate(prompt, rule=rule, max_new_tokens=12).texts[0] for prompt in PROMPTS]
    assert len(set(wanted)) > 1
    with start(warm, folder, "--head", folder / "head", "--max-new-tokens", 12, "--device", "cpu") as process:
        found = []
        for prompt in PROMPTS:  # an answer is there before the next question is asked
            process.stdin.write(f"\n{prompt}\n")
            process.stdin.flush()
            found.append(process.stdout.readline().strip())
        rest, notes = process.communicate("w1 " * 400 + "\n", timeout=60)
    assert found == [text.strip() for text in wanted]
    assert notes.count("per verifier call") == len(PROMPTS)
    assert (rest, process.returncode) == ("", 0)  # a bad prompt is refused and does not end the service
    assert "exceed" in notes
    assert "Traceback" not in notes


def test_one_clear_line_for_a_bad_head(folder, warm):
    with start(warm, folder, "--head", folder / "nothing") as process:
        _, notes = process.communicate("w1\n", timeout=120)
    assert process.returncode == 2
    assert notes.startswith("error: ")
    assert "Traceback" not in notes
