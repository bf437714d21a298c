"""Whatever is asked: a greedy row of a batch is what it is when decoded alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of
from decoding.test_counts import heads

from deferral_train.decoding import CascadeOutput
from deferral_train.decoding.stopping import ConfidenceStop, CumulativeStop
from deferral_train.rules import PositionRule, Rule, make_rule
from deferral_train.rules.summary import Summary

RULES_OF = {
    "speculative": ("opt", "chow", "diff_log", "token_v1", "token_v2", "token_v3", "biased", "learned"),
    "token": ("opt", "chow", "early"),
    "lazy": ("chow", "early"),
    "sequence": ("chow",),
}


def rule_of(draw: random.Random, execution: str) -> Rule:
    name = draw.choice(RULES_OF[execution])
    if name in heads():
        return heads()[name]
    rule = make_rule(name)
    return rule if rule.dial is None else rule.with_dial(draw.choice(rule.dial.grid(9)))


def prompts(kind: str, draw: random.Random, rows: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([draw.randint(1, 14) for _ in range(rows)])[:, None]
    width = int(lengths.max())
    ids = torch.randint(4, 40, (rows, width), generator=torch.Generator().manual_seed(draw.randint(0, 999)))
    place = torch.arange(width)
    mask = place < lengths if kind == "t5" else place >= width - lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def options_of(draw: random.Random) -> dict[str, Any]:
    """A call at random: rows end early, at many places."""
    execution = draw.choice(["speculative", "speculative", "token", "lazy", "sequence"])
    options: dict[str, Any] = {
        "rule": rule_of(draw, execution),
        "execution": execution,
        "max_new_tokens": draw.choice([1, 5, 14]),
        "num_draft_tokens": draw.choice([1, 3, 6]),
        "eos_token_id": draw.sample(range(4, 40), draw.choice([1, 4, 8])),
    }
    if draw.random() < 0.2:
        options["repetition_penalty"] = 1.3
    if execution == "speculative" and draw.random() < 0.3:
        options["stop"] = draw.choice([ConfidenceStop(0.4), CumulativeStop(0.3)])
    if execution in ("speculative", "token") and draw.random() < 0.4:
        options["max_request_loss"] = draw.choice([0.0, 0.4, 2.0])
    return options


def told(output: CascadeOutput, row: int) -> tuple[Any, ...]:
    """All that a call says of a row."""
    text = emitted(output, row)
    return text, output.stats.origin[row, : len(text)].tolist(), output.stats.row(row)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2", "gemma2", "mistral"])
def test_a_row_is_what_it_is_alone(kind: str, seed: int) -> None:
    draw = random.Random(1000 * seed + len(kind))
    drafter, verifier, _ = pair_of(kind, draw.choice(["sometimes", "never"]))
    inputs, options = prompts(kind, draw, 7), options_of(draw)
    rule = options.pop("rule")
    batch = generate(drafter, verifier, inputs, rule, **options)
    for row in draw.sample(range(7), 3):
        alone = generate(drafter, verifier, row_of(kind, inputs, row), rule, **options)
        assert told(batch, row) == told(alone, 0), (row, rule, options)
        if alone.stats.spent is not None:
            limit, spent = options["max_request_loss"], float(batch.stats.spent[row])
            assert spent <= limit
            assert spent == pytest.approx(float(alone.stats.spent[0]), abs=1e-4)


class LateDeferral(PositionRule):
    """Needs the verifier from the sixth token on."""

    name = "late"
    stage = "draft"
    needs = frozenset({"position"})

    def defer(self, summary: Summary) -> torch.Tensor:
        return summary["position"] >= 5


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("execution", ["lazy", "token"])
def test_rows_that_end_before_the_verifier_has_run(kind: str, execution: str) -> None:
    """The longest prompt, by which the others were padded, has left."""
    drafter, verifier, _ = pair_of(kind, "never")
    inputs = prompts_for(kind, rows=5)
    first = generate(drafter, verifier, inputs, "drafter_only")
    texts = [emitted(first, row) for row in range(5)]
    assert any(texts[0][0] not in text[:6] for text in texts[1:3])
    options = {"execution": execution, "eos_token_id": texts[0][0]}
    batch = generate(drafter, verifier, inputs, LateDeferral(), **options)
    for row in range(5):
        alone = generate(drafter, verifier, row_of(kind, inputs, row), LateDeferral(), **options)
        assert told(batch, row) == told(alone, 0)
