"""Counts add up on every row, seeds repeat, neighbours do not matter, lossless ends and loss limits hold."""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of

from deferral_train.decoding import CascadeOutput
from deferral_train.errors import InputError
from deferral_train.heads.gap import GapHead
from deferral_train.heads.rules import learned_rule
from deferral_train.rules import RULES, Origin, Rule, make_rule

NAMES = [name for name in RULES if name not in ("judge", "learned", "token_gap", "csd")]


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


def test_block_verification_adds_up_and_is_refused_where_it_is_not_derived() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs, options = prompts_for("llama"), {"do_sample": True, "top_k": 0, "max_new_tokens": 10}
    for name in ("lossless", "token_v3"):
        generator = torch.Generator().manual_seed(3)
        stats = generate(
            drafter, verifier, inputs, name, verification="block", generator=generator, **options
        ).stats
        assert torch.equal(stats.drafted, stats.kept + stats.accepted + stats.rejected + stats.discarded)
        assert int(stats.accepted.sum()) > 0
    greedy = [generate(drafter, verifier, inputs, "opt", verification=way) for way in ("token", "block")]
    assert torch.equal(greedy[0].sequences, greedy[1].sequences)
    for rule, bad, message in [
        ("cactus", {}, "rule cactus: verification 'block' needs"),
        ("opt", {"max_request_loss": 1.0}, "rule opt: max_request_loss with verification 'block'"),
        ("opt", {"execution": "token"}, "verification='block' checks drafted blocks"),
        ("opt", {"verification": "blocks"}, "verification is 'blocks'; use one of token, block"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(drafter, verifier, inputs, rule, **{"verification": "block", **bad})


def test_a_rule_that_judges_blocks_is_refused_what_it_cannot_do() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama")
    with pytest.raises(InputError, match="rule fly waits for 2 drafted tokens behind one, and blocks have 2"):
        generate(drafter, verifier, inputs, "fly", num_draft_tokens=2)
    with pytest.raises(InputError, match="rule fly: bonus 'exact' is drawn from a rule's target"):
        generate(drafter, verifier, inputs, "fly", bonus="exact")
    with pytest.raises(InputError, match="needs a rule that decides per position; fly does not"):
        generate(drafter, verifier, inputs, "fly", execution="token")
    loose = make_rule("fly", threshold=0.0, window=1)
    kept = [
        int(generate(drafter, verifier, inputs, rule).stats.kept.sum())
        for rule in (loose, loose.with_dial(1.1))
    ]
    assert kept[0] > 0 == kept[1]


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


class EarlyHead:
    """A draft-stage head with a formula for weights."""

    stage, features = "draft", ("drafter_max",)

    def gap(self, summary: Any) -> torch.Tensor:
        return 1.0 - summary["drafter_max"]

    def tv(self, summary: Any) -> torch.Tensor:
        return torch.ones_like(summary["drafter_max"])


class JudgeHead:
    """Approves of whatever the verifier finds likely enough."""

    features = ("verifier_logprob",)

    def score(self, summary: Any) -> torch.Tensor:
        return summary["verifier_logprob"].exp()


@cache
def heads() -> dict[str, Rule]:
    torch.manual_seed(1)
    trained = GapHead(("drafter_max", "verifier_max", "drafter_entropy", "tv")).eval().requires_grad_(False)
    trained.body[-1].bias.fill_(0.2)
    return {
        "learned": learned_rule(trained, alpha=0.9),
        "early": make_rule("learned", head=EarlyHead(), alpha=0.9),
        "judge": make_rule("judge", head=JudgeHead(), threshold=0.02),
    }


def lossy(name: str) -> Rule:
    """The rule at the end of its dial where it keeps most."""
    if name in heads():
        return heads()[name]
    dial = RULES[name].dial
    return (
        make_rule(name) if dial is None or dial.drafter is None else make_rule(name).with_dial(dial.drafter)
    )


SAMPLED = {"do_sample": True, "top_k": 0}
SPENDERS = {
    "opt",
    "chow",
    "diff",
    "opt_verifier",
    "token_v1",
    "token_v2",
    "token_v3",
    "drafter_only",
    "learned",
    "early",
}
EVERY = [*NAMES, "learned", "early", "judge"]
CASES = [(name, {}) for name in EVERY] + [
    (name, SAMPLED) for name in ("opt", "token_v3", "lossy", "learned", "early")
]


@functools.cache
def greedy_text() -> torch.Tensor:
    """The verifier's own."""
    _, verifier, _ = pair_of("llama", "never")
    return verifier.generate(**prompts_for("llama"), do_sample=False, max_new_tokens=12)


@pytest.mark.parametrize(("name", "sampling"), CASES)
def test_no_loss_allowed_is_lossless_and_a_limit_is_never_exceeded(
    name: str, sampling: dict[str, Any]
) -> None:
    drafter, verifier, _ = pair_of("llama", "never")
    inputs = prompts_for("llama")
    rule = lossy(name)

    def run(rule: Rule | str, limit: float | None) -> CascadeOutput:
        generator = torch.Generator().manual_seed(4)
        options = {"max_new_tokens": 12, "generator": generator, "max_request_loss": limit, **sampling}
        return generate(drafter, verifier, inputs, rule, **options)

    none = run(rule, 0.0)
    if RULES.get(name) is None or RULES[name].drafts:
        assert torch.equal(none.sequences, run("lossless", None).sequences)
    if not sampling:
        assert torch.equal(none.sequences, greedy_text())
    assert float(none.stats.spent.max()) == 0.0
    free = run(rule, 1e9)
    most = float(free.stats.spent.max())
    for limit in (most / 10, most / 2):
        spent = run(rule, limit).stats.spent
        assert float(spent.max()) <= limit
        assert float(spent.max()) < most or most == 0.0  # the limit did bind
    # The others keep nothing that the verifier would not give itself, at this dial and on this text.
    assert most > 0.0 or name not in SPENDERS


@pytest.mark.parametrize(
    ("name", "execution"), [("opt", "token"), ("chow", "token"), ("early", "token"), ("early", "lazy")]
)
def test_a_limit_holds_without_blocks(name: str, execution: str) -> None:
    drafter, verifier, _ = pair_of("t5", "never")
    inputs = prompts_for("t5")
    rule, options = lossy(name), {"max_new_tokens": 12, "execution": execution}
    expected = verifier.generate(**inputs, do_sample=False, max_new_tokens=12)
    none = generate(drafter, verifier, inputs, rule, max_request_loss=0.0, **options)
    assert torch.equal(none.sequences, expected)
    most = float(generate(drafter, verifier, inputs, rule, max_request_loss=1e9, **options).stats.spent.max())
    assert most > 0.0
    for limit in (most / 10, most / 2):
        some = generate(drafter, verifier, inputs, rule, max_request_loss=limit, **options)
        assert 0.0 < float(some.stats.spent.max()) <= limit


def test_a_limit_that_cannot_be_kept_is_refused() -> None:
    drafter, verifier, _ = pair_of("llama")
    for execution, message in (("lazy", "estimates its loss from the verifier"), ("sequence", "whole row")):
        with pytest.raises(InputError, match=message):
            generate(
                drafter, verifier, prompts_for("llama"), "chow", execution=execution, max_request_loss=1.0
            )
