"""Heads and traces of release 0.1 load and decide the same in this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rules.instances import instances, label
from safetensors.torch import load_file

from deferral_train import DeferralHead, open_traces
from deferral_train.rules import PositionRule, summarize

FOLDER = Path(__file__).parent / "release_0_1"
RECORD = json.loads((FOLDER / "decisions.json").read_text())
POSITION_RULES = {label(rule): rule for rule in instances() if isinstance(rule, PositionRule)}


@pytest.fixture(scope="module")
def summary():
    logits = load_file(FOLDER / "logits.safetensors")
    return summarize(logits["drafter"], logits["verifier"], token=logits["drafter"].argmax(-1))


@pytest.mark.parametrize("name", sorted(RECORD["heads"]))
def test_a_head_of_release_0_1_decides_the_same(name, summary):
    head = DeferralHead.from_pretrained(FOLDER / "heads" / name)
    for output, expected in RECORD["heads"][name].items():
        with torch.no_grad():
            found = head.defer(summary, 0.1) if output == "defer" else getattr(head, output)(summary)
        if output == "defer":
            assert found.tolist() == expected
        else:  # float32; kernels may sum in another order
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
            clear = torch.tensor(expected).abs() > 1e-5
            assert torch.equal((found > 0)[clear], (torch.tensor(expected) > 0)[clear])


@pytest.mark.parametrize("name", sorted(RECORD["rules"]))
def test_a_rule_decides_as_release_0_1_did(name, summary):
    assert POSITION_RULES[name].defer(summary).tolist() == RECORD["rules"][name]


@pytest.mark.parametrize("name", sorted(RECORD["traces"]))
def test_traces_of_release_0_1_give_the_same_decisions(name):
    traces = open_traces(FOLDER / "traces", verify=True)
    assert POSITION_RULES[name].defer(traces.summary()).tolist() == RECORD["traces"][name]


def test_traces_of_release_0_1_keep_prompts_and_hidden_states():
    traces = open_traces(FOLDER / "traces")
    assert traces.prompt_ids == ("p0", "p1", "p2", "p3")
    assert traces.summary(["drafter_hidden"]).drafter_hidden.shape == (len(traces), 32)
    assert len(traces) == len(next(iter(RECORD["traces"].values())))
