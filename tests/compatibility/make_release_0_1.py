"""Writes ``release_0_1``: heads, traces and decisions as release 0.1 made them, for later releases to load.

Run once, on that release: ``PYTHONPATH=tests python tests/compatibility/make_release_0_1.py``. What it writes is
data of record and is never made again.
"""

from __future__ import annotations

import json
from pathlib import Path

import tiny_models
import torch
from heads.distributions import every_head, logits
from rules.instances import instances, label
from safetensors.torch import save_file

from deferral_train import open_traces
from deferral_train.collecting import CollectConfig, collect
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import PositionRule, summarize

FOLDER = Path(__file__).parent / "release_0_1"


def main() -> None:
    drafter, verifier = logits(64, seed=5)
    save_file({"drafter": drafter, "verifier": verifier}, FOLDER / "logits.safetensors")
    summary = summarize(drafter, verifier, token=drafter.argmax(-1))
    record: dict[str, dict] = {"heads": {}, "rules": {}, "traces": {}}
    for name, head in every_head().items():
        folder = head.save_pretrained(FOLDER / "heads" / name)
        (folder / "README.md").unlink()
        with torch.no_grad():
            alpha = {"alpha": 0.1} if head.head_type == "cost_sensitive" else {}
            outputs = {"defer": head.defer(summary, 0.1).tolist()} if alpha else {}
            if not (alpha and head.stage == "draft"):
                outputs["gap"] = head.gap(summary).tolist()
            if head.head_type == "judge":
                outputs["score"] = head.score(summary).tolist()
            if head.stage == "draft" and head.head_type == "gap":
                outputs["tv"] = head.tv(summary).tolist()
        record["heads"][name] = outputs
    for rule in instances():
        if isinstance(rule, PositionRule):
            record["rules"][label(rule)] = rule.defer(summary).tolist()
    pair = make_pair(*tiny_models.tiny_pair("t5"))
    prompts = [Prompt(f"p{n}", f"w{n} w{n + 3} w{2 * n}", f"w{n + 1} w{n + 2} w5") for n in range(4)]
    config = CollectConfig(device="cpu", log_top_k=8, hidden="both", max_new_tokens=6)
    collect(config, FOLDER / "traces", progress=False, models=pair, prompts=prompts)
    for leftover in FOLDER.glob("traces/*.provenance.json"):
        leftover.unlink()
    traces = open_traces(FOLDER / "traces")
    for rule in instances():
        if isinstance(rule, PositionRule) and rule.needs <= set(traces.summary().names):
            record["traces"][label(rule)] = rule.defer(traces.summary()).tolist()
    (FOLDER / "decisions.json").write_text(json.dumps(record))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    main()
