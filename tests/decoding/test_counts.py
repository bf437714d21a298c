"""Counts add up on every row, seeds repeat, neighbours do not matter, lossless ends and loss limits hold."""

from __future__ import annotations

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of

from deferral_train.rules import RULES, Origin, make_rule

NAMES = [name for name in RULES if name not in ("judge", "learned")]


@pytest.mark.parametrize("name", NAMES)
def test_counts_add_up_and_seeds_repeat(name: str) -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama")
    options = {"do_sample": True, "top_k": 12, "temperature": 0.8, "max_new_tokens": 10}
    outputs = [
        generate(drafter, verifier, inputs, name, generator=torch.Generator().manual_seed(5), **options)
        for _ in range(2)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    stats = outputs[0].stats
    parts = stats.kept + stats.accepted + stats.unverified + stats.rejected + stats.discarded
    assert torch.equal(stats.drafted, parts)
    assert torch.equal(stats.emitted, stats.kept + stats.accepted + stats.resampled + stats.bonus)
    for origin, total in ((Origin.KEPT, stats.kept), (Origin.BONUS, stats.bonus)):
        assert torch.equal((stats.origin == origin).sum(dim=1), total)
    assert int(stats.positions["rejected"].sum()) == int(stats.rejected.sum())
    if RULES[name].drafts and name != "drafter_only":
        assert int(stats.positions["drafted"].sum()) == int(stats.drafted.sum())
        assert torch.equal(
            stats.positions["accepted"] + stats.positions["rejected"], stats.positions["decided"]
        )


@pytest.mark.parametrize("kind", ["t5", "mistral"])
@pytest.mark.parametrize("name", ["opt", "token_v3", "chow"])
def test_a_greedy_row_does_not_depend_on_its_neighbours(kind: str, name: str) -> None:
    drafter, verifier, _ = pair_of(kind)
    inputs = prompts_for(kind)
    together = generate(drafter, verifier, inputs, name, max_new_tokens=12)
    for row in range(4):
        alone = generate(drafter, verifier, row_of(kind, inputs, row), name, max_new_tokens=12)
        assert emitted(alone, 0) == emitted(together, row)
        assert alone.stats.row(0) == together.stats.row(row)


LOSSLESS_ENDS = [
    name for name in NAMES if RULES[name].dial is not None and RULES[name].dial.lossless is not None
]


@pytest.mark.parametrize("name", LOSSLESS_ENDS)
def test_a_lossless_end_is_lossless_token_by_token(name: str) -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama")
    rule = make_rule(name)
    rule = rule.with_dial(RULES[name].dial.lossless)
    for options in ({}, {"do_sample": True, "top_k": 0}):
        outputs = [
            generate(
                drafter,
                verifier,
                inputs,
                one,
                max_new_tokens=10,
                generator=torch.Generator().manual_seed(3),
                **options,
            )
            for one in ("lossless", rule)
        ]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert torch.equal(outputs[0].stats.accepted, outputs[1].stats.accepted)


@pytest.mark.parametrize("name", ["opt", "chow", "token_v3", "diff", "opt_verifier", "drafter_only"])
def test_no_loss_allowed_is_lossless_and_a_limit_is_never_exceeded(name: str) -> None:
    drafter, verifier, _ = pair_of("llama", "never")
    inputs = prompts_for("llama")
    dial = RULES[name].dial
    rule = (
        make_rule(name) if dial is None or dial.drafter is None else make_rule(name).with_dial(dial.drafter)
    )
    expected = verifier.generate(**inputs, do_sample=False, max_new_tokens=12)
    none = generate(drafter, verifier, inputs, rule, max_new_tokens=12, max_request_loss=0.0)
    assert torch.equal(none.sequences, expected)
    free = generate(drafter, verifier, inputs, rule, max_new_tokens=12, max_request_loss=1e9)
    most = float(free.stats.spent.max())
    assert most > 0.0
    for limit in (most / 10, most / 2):
        some = generate(drafter, verifier, inputs, rule, max_new_tokens=12, max_request_loss=limit)
        assert some.stats.spent is not None
        assert float(some.stats.spent.max()) <= limit
        assert int(some.stats.kept.sum()) <= int(free.stats.kept.sum())
        assert float(some.stats.spent.max()) < most  # the limit did bind
