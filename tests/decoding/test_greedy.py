"""The short verification at temperature 0 gives what verify_block gives, for every rule that it serves."""

from __future__ import annotations

import pytest
import torch

from deferral_train.decoding.greedy import is_plain, judge_greedy
from deferral_train.decoding.outcome import outcome_of
from deferral_train.decoding.proposing import Draft
from deferral_train.errors import InputError
from deferral_train.rules import RULES, make_rule, quick, verify_block
from deferral_train.rules.summary import summarize

SERVED = [
    name
    for name in RULES
    if name not in ("judge", "learned") and is_plain(make_rule(name), "verifier", None, None)
]


def test_most_rules_are_served() -> None:
    assert {"lossless", "opt", "diff", "chow", "token_v3", "opt_verifier"} <= set(SERVED)
    assert not is_plain(make_rule("opt"), "exact", None, None)
    assert not is_plain(make_rule("opt"), "verifier", 1.0, None)


@pytest.mark.parametrize("name", SERVED)
def test_same_verdict_as_verify_block(name: str) -> None:
    generator = torch.Generator().manual_seed(11)
    rows, depth, size = 64, 4, 7
    verifier = 2 * torch.randn(rows, depth + 1, size, generator=generator)
    drafter = verifier[:, :depth] + torch.randn(rows, depth, size, generator=generator)
    verifier[::5, :, 2] = -torch.inf  # a token that the verifier's processors forbid
    drafted = drafter.argmax(dim=-1)
    lengths = torch.randint(0, depth + 1, (rows,), generator=generator)
    from_device = Draft(drafted, lengths, drafter.split(1, dim=1))
    known = Draft(drafted, lengths.tolist(), [drafter], on_host=drafted.tolist())
    verdict = verify_block(make_rule(name), drafted, drafter, verifier, temperature=0.0, lengths=lengths)
    whole = outcome_of(verdict, from_device)
    assert 0 < sum(whole.accepted) < int(lengths.sum())
    for draft in (from_device, known):
        short = judge_greedy(make_rule(name), draft, verifier, None)
        for field in ("proposed", "accepted", "emitted", "origins"):
            assert getattr(short, field) == getattr(whole, field), field
        for length, mine, theirs in zip(lengths.tolist(), short.deferred, whole.deferred):
            assert mine == theirs[:length]


def test_not_a_number_is_refused() -> None:
    logits = torch.full((1, 2, 3), torch.nan)
    draft = Draft(torch.zeros(1, 1).long(), [1], [logits[:, :1]], on_host=[[0]])
    with pytest.raises(InputError, match="NaN"):
        judge_greedy(make_rule("lossless"), draft, logits, None)


@pytest.mark.parametrize("small", [0, quick.SMALL])
def test_the_quick_summary_is_the_summary(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "SMALL", small)  # 0: memory is kept from block to block
    generator = torch.Generator().manual_seed(3)
    verifier = 5 * torch.randn(3, 5, 40, generator=generator, dtype=torch.float64) + 30
    drafter = verifier[:, :4] + torch.randn(3, 4, 40, generator=generator, dtype=torch.float64)
    verifier[1, :, 7] = -torch.inf
    token = drafter.argmax(dim=-1)
    fields = frozenset(quick._FORMULAS)
    assert quick.knows(fields, drafter, verifier)
    found = quick.summarize_greedy(fields, drafter, verifier[:, :4], token)
    expected = summarize(drafter, verifier[:, :4], temperature=0.0, token=token, fields=fields)
    for name in fields:
        torch.testing.assert_close(found[name], expected[name], atol=1e-13, rtol=1e-12)
    before = {name: value.clone() for name, value in found.items()}
    turned = quick.summarize_greedy(fields, verifier[:, :4], drafter, token)
    assert turned["kl"][1].isinf().all()  # the first law gives what the second forbids
    torch.testing.assert_close(turned["reverse_kl"], expected["kl"], atol=1e-13, rtol=1e-12)
    assert all(torch.equal(found[name], before[name]) for name in fields)  # nothing points into kept memory
    drafter[0, 1, 2] = torch.nan
    with pytest.raises(InputError, match="drafter_logits has NaN"):
        quick.summarize_greedy(fields, drafter, verifier[:, :4], token)
