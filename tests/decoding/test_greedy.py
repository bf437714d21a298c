"""The short verification at temperature 0 gives what verify_block gives, for every rule that it serves."""

from __future__ import annotations

import pytest
import torch

from deferral_train.decoding.greedy import is_plain, judge_greedy
from deferral_train.decoding.outcome import outcome_of
from deferral_train.decoding.proposing import Draft
from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.gap import GapHead
from deferral_train.rules import RULES, make_rule, numbers, verify_block
from deferral_train.rules.summary import Summary, summarize

SERVED = [
    name
    for name in RULES
    if name not in ("judge", "learned") and is_plain(make_rule(name), "verifier", None, None)
]


def test_most_rules_are_served() -> None:
    assert {"lossless", "opt", "diff", "chow", "token_v3", "opt_verifier"} <= set(SERVED)
    assert not is_plain(make_rule("opt"), "exact", None, None)
    assert not is_plain(make_rule("opt"), "verifier", 1.0, None)


@pytest.mark.filterwarnings("ignore:.*encountered in")  # the loop enters np.errstate once for all blocks
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


def numbers_of(drafter: torch.Tensor, verifier: torch.Tensor, token: torch.Tensor) -> numbers.Numbers:
    sides = [
        numbers.Side(
            [part.numpy() for part in logits.split([1, token.shape[1] - 1], dim=1)], token.shape[1], name
        )
        for logits, name in ((drafter, "drafter_logits"), (verifier, "verifier_logits"))
    ]
    return numbers.Numbers(*sides, token.numpy().reshape(-1))


@pytest.mark.parametrize("small", [0, numbers.SMALL])
@pytest.mark.parametrize("high", [0.0, 400.0])  # of which exp is no number in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_numbers_are_the_summary(
    small: int, high: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "SMALL", small)  # 0: memory is kept from block to block
    generator = torch.Generator().manual_seed(3)
    verifier = 5 * torch.randn(3, 4, 40, generator=generator, dtype=dtype) + 10
    drafter = verifier + torch.randn(3, 4, 40, generator=generator, dtype=dtype)
    verifier[1, :, 7] = -torch.inf
    verifier[0, 0], drafter[0, 1], drafter[1, 2] = verifier[0, 0] + high, drafter[0, 1] + high, -high
    drafter[2, 3] = verifier[2, 3]
    verifier[0, 3, 5] = verifier[0, 3].max()  # a tie
    token = drafter.argmax(dim=-1)
    fields = frozenset(numbers.FORMULAS)
    close = {"atol": 1e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-11}
    read = numbers_of(drafter, verifier, token)
    found = read.summary(fields, (3, 4))
    expected = summarize(drafter, verifier, temperature=0.0, token=token, fields=fields)
    for name in fields:
        torch.testing.assert_close(found[name], expected[name], **close)
    some = read.only([0, 5, 7, 11]).summary(fields, (4,))
    for name in fields:
        torch.testing.assert_close(some[name], expected[name].reshape(-1)[[0, 5, 7, 11]], **close)
    # Equal logits give equal numbers, so that ties tie.
    for name in ("max", "entropy"):
        assert found[f"drafter_{name}"][2, 3] == found[f"verifier_{name}"][2, 3]
    before = {name: value.clone() for name, value in found.items()}
    turned = numbers_of(verifier, drafter, token).summary(fields, (3, 4))
    assert turned["kl"][1].isinf().all()  # the first law gives what the second forbids
    torch.testing.assert_close(turned["reverse_kl"], expected["kl"], **close)
    assert all(torch.equal(found[name], before[name]) for name in fields)  # nothing points into kept memory
    for wrong in (torch.nan, torch.inf):
        drafter[0, 1, 2] = wrong
        with pytest.raises(InputError, match="drafter_logits has NaN"):
            numbers_of(drafter, verifier, token)["drafter_max"]


def test_a_head_reads_numbers_as_it_reads_a_summary() -> None:
    generator = torch.Generator().manual_seed(4)
    verifier = 2 * torch.randn(3, 5, 40, generator=generator)
    drafter = verifier[:, :4] + torch.randn(3, 4, 40, generator=generator)
    token = drafter.argmax(dim=-1)
    features = (
        "drafter_max:logit",
        "verifier_entropy",
        "token_is_argmax",
        "verifier_at_drafter_argmax",
        "draft_position",
    )
    place = torch.arange(4).expand(3, 4)
    for loss in ("zero_one", "log"):
        head = GapHead(features, loss=loss).eval()
        torch.nn.init.normal_(head.body[-1].weight)
        rule = make_rule("learned", head=head, alpha=0.05)
        context = Summary({"draft_position": place})
        fields = rule.needs - {"draft_position"}
        summary = summarize(drafter, verifier[:, :4], temperature=0.0, token=token, fields=fields)
        summary = summary.with_fields(dict(context))
        with torch.no_grad():  # so that it defers here and there
            head.body[-1].bias.sub_(DeferralHead.gap(head, summary)[summary["tv"] > 0].median())
        expected = DeferralHead.gap(head, summary) > 0.05 * summary["tv"]
        draft = Draft(token, [4] * 3, drafter.split(1, dim=1), on_host=token.tolist())
        found = judge_greedy(rule, draft, verifier, context)
        assert 0 < int(expected.sum()) < 12
        assert torch.equal(torch.tensor(found.deferred), expected)
