"""decode: rules side by side, resumable after a kill, finished outputs kept, heads checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding.helpers import pair_of
from tiny_models import save_tiny_pair
from warm import Warm

from deferral_train.commands.decode import DecodeSettings, run, stop_from_spec
from deferral_train.decoding import DecodeConfig, Pair, Settings, load_pair
from deferral_train.decoding.decode import decode
from deferral_train.decoding.outputs import OutputFolder, read_lines
from deferral_train.decoding.stopping import ConfidenceStop
from deferral_train.errors import InputError
from deferral_train.heads.gap import GapHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt, read_prompts, write_prompts
from deferral_train.rules import LearnedRule, Origin, PositionRule, make_rule

PROMPTS = [
    Prompt(f"p{i}", " ".join(f"w{(i * 7 + j) % 30}" for j in range(2 + i % 4)), "w1 w2") for i in range(10)
]
CONFIG = DecodeConfig(Settings(batch_size=4, max_new_tokens=10), repetitions=2)
RULES = ["lossless", "opt", "verifier_only", "drafter_only"]


@pytest.fixture(scope="module")
def pair() -> Pair:
    drafter, verifier, tokenizer = pair_of("llama")
    return Pair(make_pair(drafter, verifier, tokenizer))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(folder / "outputs.jsonl")]
    return sorted(rows, key=lambda row: (row["rule"], row["repetition"], row["id"]))


def test_rules_side_by_side(pair: Pair, tmp_path: Path) -> None:
    summary = decode(pair, PROMPTS, RULES, CONFIG, tmp_path)
    assert set(summary["rules"]) == {"lossless", "opt:alpha=0.2", "verifier_only", "drafter_only"}
    lossless, verifier = summary["rules"]["lossless"], summary["rules"]["verifier_only"]
    assert lossless["quality"]["bleu"] == verifier["quality"]["bleu"]
    assert lossless["verifier_calls_per_token"] < 1.0 == verifier["verifier_calls_per_token"]
    assert summary["rules"]["drafter_only"]["mean_acceptance_length"] is None
    rows = rows_of(tmp_path)
    assert len(rows) == len(RULES) * 2 * len(PROMPTS)
    for row in rows:
        counts = row["counts"]
        parts = sum(counts[name] for name in ("kept", "accepted", "unverified", "rejected", "discarded"))
        assert counts["drafted"] == parts
        assert len(row["tokens"]) == len(row["origin"]) == counts["emitted"]
    texts = {r: [row["text"] for row in rows if row["rule"] == r] for r in ("lossless", "verifier_only")}
    assert texts["lossless"] == texts["verifier_only"]
    positions = lossless["positions"]
    assert sum(positions["drafted"]) == lossless["counts"]["drafted"]
    order = [(b["repetition"], b["batch"], b["rule"]) for b in read_lines(tmp_path / "batches.jsonl")]
    assert [rule for _, _, rule in order[:4]] == [
        "lossless",
        "opt:alpha=0.2",
        "verifier_only",
        "drafter_only",
    ]


def test_what_takes_long_shows_how_far_it_is(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode(pair, PROMPTS, ["lossless"], CONFIG, tmp_path / "quick")
    assert "decode:" not in capsys.readouterr().err
    monkeypatch.setattr("deferral_train.decoding.decode.SILENT", 0.0)
    decode(pair, PROMPTS, ["lossless"], CONFIG, tmp_path / "slow")
    assert "6/6" in capsys.readouterr().err  # 3 batches, twice


def test_a_token_log_tells_why(pair: Pair, tmp_path: Path) -> None:
    config = DecodeConfig(Settings(batch_size=4, max_new_tokens=8), log_tokens=3)
    decode(pair, PROMPTS[:4], ["opt"], config, tmp_path)
    for row in rows_of(tmp_path):
        assert len(row["token_log"]) == len(row["tokens"])
        for token, origin, entry in zip(row["tokens"], row["origin"], row["token_log"]):
            assert len(entry["verifier_top"]) == 3
            if origin == Origin.KEPT:
                assert entry["drafted"] == token == entry["drafter_top"][0][0]
                assert not entry["deferred"]
            if origin in (Origin.RESAMPLED, Origin.BONUS):
                assert token == entry["verifier_top"][0][0]


SCRIPT = """
import sys
from pathlib import Path
from deferral_train.decoding import DecodeConfig, Settings, load_pair
from deferral_train.decoding.decode import decode
from deferral_train.pairs.prompts import read_prompts
folder = Path(sys.argv[1])
pair = load_pair(str(folder / "drafter"), str(folder / "verifier"), device="cpu")
config = DecodeConfig(Settings(batch_size=2, max_new_tokens=24, temperature=0.9, seed=4), repetitions=6)
decode(pair, read_prompts(folder / "prompts.jsonl"), ["lossless", "opt"], config, sys.argv[2])
"""


def test_a_killed_run_resumes_to_the_same_outputs(tmp_path: Path, warm: Warm) -> None:
    save_tiny_pair("llama", tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS[:4])
    command = [warm.python, "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    batches = tmp_path / "killed" / "batches.jsonl"
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (
        not batches.exists() or len(batches.read_bytes().splitlines()) < 3
    ):
        time.sleep(0.02)
    assert warm.kill(process) == -signal.SIGKILL
    before = len(batches.read_bytes().splitlines())
    assert 3 <= before < 24
    with open(tmp_path / "killed" / "outputs.jsonl", "a", encoding="utf-8") as file:
        file.write('{"rule": "lossless", "repetition": 5, "batch"')  # a line that the kill cut short
    models = load_pair(str(tmp_path / "drafter"), str(tmp_path / "verifier"), device="cpu")
    config = DecodeConfig(Settings(batch_size=2, max_new_tokens=24, temperature=0.9, seed=4), repetitions=6)
    for folder in ("killed", "whole"):
        decode(
            models, read_prompts(tmp_path / "prompts.jsonl"), ["lossless", "opt"], config, tmp_path / folder
        )
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    summaries = [json.loads((tmp_path / f / "summary.json").read_text()) for f in ("killed", "whole")]
    for rule in ("lossless", "opt:alpha=0.2"):
        assert summaries[0]["rules"][rule]["counts"] == summaries[1]["rules"][rule]["counts"]


def test_finished_outputs_survive_too_little_memory(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = pair.decode_batch, []

    def scarce(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("no room")
        return whole(*arguments, **named)

    monkeypatch.setattr(pair, "decode_batch", scarce)
    with pytest.raises(InputError, match="out of memory at batch_size=4"):
        decode(pair, PROMPTS, ["lossless"], CONFIG, tmp_path)
    assert len(rows_of(tmp_path)) == 10
    monkeypatch.undo()
    decode(pair, PROMPTS, ["lossless"], CONFIG, tmp_path)
    assert len(rows_of(tmp_path)) == 20


def test_another_run_is_not_mixed_in(pair: Pair, tmp_path: Path) -> None:
    decode(pair, PROMPTS[:2], ["lossless"], CONFIG, tmp_path)
    with pytest.raises(InputError, match="other prompts"):
        decode(pair, PROMPTS[:3], ["lossless"], CONFIG, tmp_path)


def test_a_run_that_was_refused_before_its_first_batch_holds_no_folder(tmp_path: Path) -> None:
    OutputFolder(tmp_path, {"settings": "that no rule can take"})
    folder = OutputFolder(tmp_path, {"settings": "corrected"})
    folder.append(
        [{"rule": "opt", "repetition": 0, "batch": 0}],
        {"rule": "opt", "repetition": 0, "batch": 0, "rows": 1},
    )
    with pytest.raises(InputError, match="other settings"):
        OutputFolder(tmp_path, {"settings": "others"})
    assert len(OutputFolder(tmp_path, {"settings": "corrected"}).finished) == 1


def test_heads_of_another_pair_are_refused(pair: Pair) -> None:
    head = GapHead(("drafter_max", "verifier_max")).eval().requires_grad_(False)
    rule = learned_rule(head, alpha=0.1)
    head.metadata = {"pair": {"vocab_size": 99}}
    with pytest.raises(InputError, match="another vocabulary"):
        pair.generate("w1 w2", rule=rule, accept_mismatch=True)
    head.metadata = {"pair": {"dtype": "float16"}, "certificate": {"temperature": 1.0}}
    with pytest.raises(InputError, match="accept-mismatch"):
        pair.generate("w1 w2", rule=rule)
    accepted = pair.generate("w1 w2", rule=rule, accept_mismatch=True, max_new_tokens=4)
    assert len(accepted.mismatches) == 2
    with pytest.raises(InputError, match="draft-stage head cannot read verifier_max"):
        LearnedRule(head=GapHead(("verifier_max",), stage="draft"))


def test_a_head_that_is_never_asked_fails_the_run(pair: Pair) -> None:
    class Deaf(LearnedRule):
        def defer(self, summary: Any) -> torch.Tensor:
            return summary.full(True)

    head = GapHead(("drafter_max", "verifier_max")).eval().requires_grad_(False)
    with pytest.raises(RuntimeError, match="never consulted"):
        pair.generate("w1 w2", rule=Deaf(head=head, alpha=0.1), max_new_tokens=6)
    assert issubclass(Deaf, PositionRule)


def test_pair_generate_checks_prompts_and_settings(pair: Pair) -> None:
    for prompts, settings, message in (
        ("", {}, "empty"),
        (" ".join(["w1"] * 200), {}, "context of 128"),
        ("w1", {"temperature": -1.0}, "temperature is -1.0"),
        ("w1", {"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ("w1", {"speed": 1}, "no setting 'speed'"),
        ([], {}, "prompts is empty"),
    ):
        with pytest.raises(InputError, match=message):
            pair.generate(prompts, **{"max_new_tokens": 8, **settings})


def test_stop_strings_end_a_text(t5_pair: Path) -> None:
    pair = load_pair(str(t5_pair / "drafter"), str(t5_pair / "verifier"), device="cpu")
    prompt = "A man in a blue shirt is standing on a ladder."
    text = pair.generate(prompt, max_new_tokens=24).texts[0]
    word = text.split()[3]
    stopped = pair.generate(prompt, max_new_tokens=24, stop_strings=[word]).texts[0]
    assert text.startswith(stopped)
    assert word in stopped
    assert len(stopped.split()) < len(text.split())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafter, verifier = save_tiny_pair("t5", tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    out = tmp_path / "out"
    config = DecodeSettings(
        str(drafter), str(verifier), str(tmp_path / "prompts.jsonl"), str(out), rules=["lossless", "opt:alpha=0.1"],
        max_new_tokens=8, stop="confidence:threshold=0.3", device="cpu",
    )  # fmt: skip
    assert run(config) == 0
    assert "opt:alpha=0.1" in capsys.readouterr().out
    assert set(json.loads((out / "summary.json").read_text())["rules"]) == {"lossless", "opt:alpha=0.1"}
    assert isinstance(stop_from_spec("confidence:threshold=0.3"), ConfidenceStop)
    with pytest.raises(InputError, match="unknown"):
        stop_from_spec("soon")
    for spec, message in (
        ("cumulative:treshold=0.1", "unknown parameter 'treshold'; cumulative takes threshold"),
        ("cumulative:threshold=low", "threshold is low; give a number"),
        ("acceptance:threshold=0.5", "no head; acceptance takes head, threshold"),
        ("acceptance", "no head; acceptance takes head, threshold"),
    ):
        with pytest.raises(InputError, match=message):
            stop_from_spec(spec)
    assert make_rule("opt", alpha=0.1).dial_value == 0.1
