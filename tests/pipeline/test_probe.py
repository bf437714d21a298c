"""`run --probe`: the ceiling on prompts that chose nothing, in numbers that can be computed another way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from evaluation.language import VOCABULARY, Language
from tiny_models import save_tiny_pair

from deferral_train import cli
from deferral_train.errors import InputError
from deferral_train.pairs.prompts import Prompt, write_prompts
from deferral_train.pipeline.config import PARTS, OperatingPointConfig
from deferral_train.pipeline.probe import HINDSIGHT, ceiling
from deferral_train.traces.splits import split_prompts

RULES = ("chow", "opt", "token_v3")
COSTS = {"drafter": 1.0, "verifier": 8.0}


def test_lossless_and_drafter_rows_follow_from_the_logged_rows_of_the_second_half(tmp_path: Path) -> None:
    traces = Language(60).write(tmp_path / "traces", 0.0, VOCABULARY)
    found = ceiling(traces, RULES, COSTS, OperatingPointConfig(), 4, 0)
    rows = {row["rule"]: row for row in found["rows"]}
    second = split_prompts(traces, (0.5, 0.5), 0)[1]
    gold, drafter, verifier = (
        second.column(f"{name}") for name in ("gold", "drafter_argmax", "verifier_argmax")
    )
    lossless, kept = found["rows"][0], found["rows"][-1]
    assert lossless["risk"] == pytest.approx(np.mean(verifier != gold), abs=1e-6)
    assert kept["risk"] == pytest.approx(np.mean(drafter != gold), abs=1e-6)
    assert lossless["rejection_rate"] == pytest.approx(np.mean(drafter != verifier), abs=1e-6)
    # Kept drafts: 5 tokens a block but for the last of each text; each block costs 8 + 4.
    calls = sum(-(-int(n) // 5) for n in np.bincount(np.asarray(second.prompt_of_row)) if n)
    assert kept["speed"] == pytest.approx(len(gold) * 8 / (calls * 12), rel=1e-5)
    assert (
        rows[HINDSIGHT]["risk"] <= min(row["risk"] for name, row in rows.items() if name != HINDSIGHT) + 1e-9
    )
    assert found["chosen"]["rule"] in RULES
    assert found["prompts"] == {"chosen_on": 30, "judged_on": 30}
    assert (found["cost_ratio"], found["worth_it"]) == (8.0, True)


def test_a_pair_that_cannot_gain_is_told_so(tmp_path: Path) -> None:
    traces = Language(40).write(tmp_path / "traces", 0.0, VOCABULARY)
    found = ceiling(traces, RULES, {"drafter": 1.0, "verifier": 1.05}, OperatingPointConfig(), 4, 0)
    assert not found["worth_it"]
    assert "use a larger verifier or a smaller drafter" in found["reason"]
    with pytest.raises(InputError, match="probe: 12 calibration prompts are too few"):
        ceiling(traces.select_prompts(traces.prompt_ids[:12]), RULES, COSTS, OperatingPointConfig(), 4, 0)


def test_run_probe_makes_the_first_stages_and_prints_the_ceiling(tmp_path, capsys) -> None:
    drafter, verifier = save_tiny_pair("t5", tmp_path / "pair")
    for number, part in enumerate(PARTS):
        prompts = [
            Prompt(
                f"{part}{n}",
                " ".join(f"w{(n * 7 + i * (number + 2)) % 35}" for i in range(8)),
                f"w{n} w{n + 1} w3",
            )
            for n in range(24)
        ]
        write_prompts(tmp_path / f"{part}.jsonl", prompts)
    config = {
        "text": {part: {"path": str(tmp_path / f"{part}.jsonl")} for part in PARTS},
        "pair": {"drafter": str(drafter), "verifier": str(verifier), "device": "cpu"},
        "traces": {"log_top_k": 8},
        "rules": list(RULES),
        "out": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert cli.main(["run", "--config", str(path), "--probe"]) == 0
    told = capsys.readouterr().out
    for expected in ("lossless", "best plug-in", "hindsight", "drafter passes", "not worth going on"):
        assert expected in told
    stored = json.loads((tmp_path / "run" / "probe" / "probe.json").read_text())
    assert len(stored["rows"]) == 4
    assert not (tmp_path / "run" / "traces").exists()
    assert cli.main(["run", "--config", str(path), "--probe"]) == 0
    assert capsys.readouterr().out.count("reused") == 3
