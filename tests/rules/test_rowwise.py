"""The row-at-a-time path gives the verdicts of the straightforward one, and reads what it says it reads."""

from __future__ import annotations

import pytest
import torch
from instances import instances, label
from test_verify import B, T, block

from deferral_train.errors import InputError
from deferral_train.rules import Origin, make_rule, rowwise, verify_block
from deferral_train.rules.block import Block

NAMES = (
    "lossless",
    "drafter_only",
    "chow",
    "diff",
    "opt",
    "token_v1",
    "token_v2",
    "token_v3",
    "logit_margin",
)
HOT = [rule for rule in instances() if rule.name in NAMES or (rule.name == "bild" and "tv" in rule.needs)]


@pytest.fixture
def counted(monkeypatch):
    """Row-at-a-time for any vocabulary, counting how often it ran."""
    calls = []
    real = rowwise.verify_rows

    def counting(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(rowwise, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr("deferral_train.rules.verify.verify_rows", counting)
    return calls


def run(rule, drafted, drafter, verifier, seed=4, **options):
    return verify_block(
        rule, drafted, drafter, verifier, generator=torch.Generator().manual_seed(seed), **options
    )


@pytest.mark.parametrize("rule", HOT, ids=label)
@pytest.mark.parametrize("masked", [False, True])
def test_same_verdict_as_the_straightforward_path(rule, masked, counted, monkeypatch):
    drafted, drafter, verifier = block(seed=31, rows=200)
    if masked:
        verifier = verifier.masked_fill(torch.arange(verifier.shape[-1]) == 3, -torch.inf)
    lengths = torch.arange(200) % (T + 1)
    for bonus in ("verifier", "exact", "none"):
        fast = run(rule, drafted, drafter, verifier, lengths=lengths, bonus=bonus)
        with monkeypatch.context() as patch:
            patch.setattr(rowwise, "LARGE_VOCABULARY", 10**9)
            slow = run(rule, drafted, drafter, verifier, lengths=lengths, bonus=bonus)
        for name in ("accepted", "next_token", "origin", "deferred"):
            assert torch.equal(getattr(fast, name), getattr(slow, name)), (name, bonus)
    assert len(counted) == 3
    if label(rule) == "opt=0.17":
        assert {Origin.KEPT, Origin.ACCEPTED, Origin.RESAMPLED} <= set(slow.origin.flatten().tolist())


@pytest.mark.parametrize("name", ["lossless", "opt", "token_v3"])
def test_large_vocabulary_in_float32(name, counted):
    drafted, drafter, verifier = block(seed=5, rows=6, vocabulary=20_000, dtype=torch.float32)
    fast = run(make_rule(name), drafted, drafter, verifier)
    exact = run(make_rule(name), drafted, drafter.double(), verifier.double(), temperature=1.0)
    assert len(counted) == 2
    assert torch.equal(fast.accepted, exact.accepted)
    assert torch.equal(fast.deferred, exact.deferred)


def test_what_it_does_not_know_goes_the_other_way(counted):
    drafted, drafter, verifier = block(seed=5)
    run(make_rule("fuzzy"), drafted, drafter, verifier)
    run(make_rule("opt"), drafted, drafter, verifier, temperature=0.5)
    run(make_rule("opt"), drafted, drafter, verifier, temperature=0.0)
    run(make_rule("opt"), drafted, drafter, verifier, max_request_loss=1.0)
    run(make_rule("opt"), drafted, drafter, verifier, verifier_sampling_logits=verifier)
    run(make_rule("lossless"), drafted, None, verifier)
    assert counted == []
    run(make_rule("opt"), drafted, drafter, verifier)
    assert len(counted) == 1


def test_bad_logits_are_refused_at_any_place(counted):
    drafted, drafter, verifier = block(seed=5)
    for value in (torch.nan, torch.inf):
        for which in (0, 1):
            logits = [drafter.clone(), verifier.clone()]
            logits[which][B - 1, T - 1, 6] = value
            with pytest.raises(InputError, match=r"rule opt: .*NaN"):
                run(make_rule("opt"), drafted, *logits)
    drafter[0, 0, drafted[0, 0]] = -torch.inf
    with pytest.raises(InputError, match="probability 0"):
        run(make_rule("opt"), drafted, drafter, verifier)


def test_applies_only_on_the_cpu_and_for_large_vocabularies():
    drafted, drafter, verifier = block()
    given = Block.of(drafted, drafter, verifier, 1.0, None, None, None, None)
    assert not rowwise.applies(make_rule("opt"), given, limited=False)
