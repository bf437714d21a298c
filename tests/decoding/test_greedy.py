"""The short verification at temperature 0 gives what verify_block gives, for every rule that it serves."""

from __future__ import annotations

import pytest
import torch

from deferral_train.decoding.greedy import is_plain, verify_greedy
from deferral_train.errors import InputError
from deferral_train.rules import RULES, make_rule, verify_block

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
    short = verify_greedy(make_rule(name), drafted, drafter, verifier, lengths, None)
    whole = verify_block(make_rule(name), drafted, drafter, verifier, temperature=0.0, lengths=lengths)
    for field in ("accepted", "next_token", "origin"):
        assert torch.equal(getattr(short, field), getattr(whole, field)), field
    inside = torch.arange(depth) < lengths[:, None]
    assert torch.equal(short.deferred & inside, whole.deferred & inside)


def test_not_a_number_is_refused() -> None:
    logits = torch.full((1, 2, 3), torch.nan)
    with pytest.raises(InputError, match="NaN"):
        verify_greedy(
            make_rule("lossless"), torch.zeros(1, 1).long(), logits, logits, torch.ones(1).long(), None
        )
