"""Verification at temperature 0 in a handful of tensor operations.

Greedy laws are one-hots: a drafted token stands iff the rule keeps it or it is the verifier's argmax, and whatever
follows the accepted tokens is the verifier's argmax, be it a correction or a bonus. Gives what ``verify_block``
gives, which the tests check for every rule; anything else goes there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import LawRule, Rule
from deferral_train.rules.laws import Laws
from deferral_train.rules.scoring import decide
from deferral_train.rules.summary import Summary
from deferral_train.rules.verify import Origin, Verdict


def is_plain(rule: Rule, bonus: str, max_request_loss: float | None, sampling: Tensor | None) -> bool:
    """Whether greedy verification needs no more than argmaxes and the rule's decision."""
    if sampling is not None or max_request_loss is not None:
        return False
    return rule.is_lossless or (bonus == "verifier" and not isinstance(rule, LawRule))


def verify_greedy(
    rule: Rule,
    drafted: Tensor,
    drafter_logits: Tensor,
    verifier_logits: Tensor,
    lengths: Tensor,
    context: Summary | None,
) -> Verdict:
    """Verdict on a block at temperature 0; arguments as for ``verify_block``, where :func:`is_plain` holds."""
    depth = drafted.shape[1]
    top, best = verifier_logits.max(dim=-1)
    if not bool(torch.isfinite(top).all()):
        raise InputError("the verifier's logits are NaN or infinite; check its weights and number format")
    if rule.is_lossless and drafted.device.type == "cpu":
        return _lossless_on_host(drafted.tolist(), best.tolist(), lengths.tolist())
    places = torch.arange(depth + 1, device=drafted.device)
    deferred = torch.ones_like(drafted, dtype=torch.bool)
    stands = drafted == best[:, :depth]
    if not rule.is_lossless and depth:
        deferred = _decide(rule, drafted, drafter_logits[:, :depth], verifier_logits[:, :depth], context)
        allowed = verifier_logits[:, :depth].gather(2, drafted[..., None])[..., 0] > -torch.inf
        kept = ~deferred & allowed
        stands = stands | kept
    inside = places[:depth] < lengths[:, None]
    accepted = (stands & inside).long().cumprod(dim=1).sum(dim=1)
    following = best.gather(1, accepted[:, None])
    origin = torch.full_like(best, int(Origin.ACCEPTED), dtype=torch.int8)
    if not rule.is_lossless and depth:
        origin[:, :depth][kept] = int(Origin.KEPT)
    origin.masked_fill_(places > accepted[:, None], int(Origin.NONE))
    last = torch.where(accepted < lengths, int(Origin.RESAMPLED), int(Origin.BONUS)).to(torch.int8)
    origin.scatter_(1, accepted[:, None], last[:, None])
    return Verdict(accepted, following[:, 0], origin, deferred & inside, None)


def _lossless_on_host(drafted: list[list[int]], best: list[list[int]], lengths: list[int]) -> Verdict:
    """The same by plain integers: on a CPU that is cheaper than a dozen small tensor operations."""
    accepted, following, origins = [], [], []
    for row, (tokens, argmaxes, length) in enumerate(zip(drafted, best, lengths)):
        count = 0
        while count < length and tokens[count] == argmaxes[count]:
            count += 1
        last = int(Origin.RESAMPLED if count < length else Origin.BONUS)
        accepted.append(count)
        following.append(best[row][count])
        origins.append([int(Origin.ACCEPTED)] * count + [last] + [int(Origin.NONE)] * (len(tokens) - count))
    depth = len(drafted[0])
    deferred = [[place < length for place in range(depth)] for length in lengths]
    return Verdict(
        torch.tensor(accepted),
        torch.tensor(following),
        torch.tensor(origins, dtype=torch.int8),
        torch.tensor(deferred, dtype=torch.bool).reshape(len(drafted), depth),
        None,
    )


def _decide(
    rule: Rule, drafted: Tensor, drafter_logits: Tensor, verifier_logits: Tensor, context: Summary | None
) -> Tensor:
    laws = Laws.of(drafter_logits, verifier_logits, 0.0)
    if context is not None:
        depth = drafted.shape[1]
        context = Summary({name: context[name][:, :depth] for name in context.names})
    deferred = decide(rule, laws, rule.read(laws, drafted, context), drafted)
    assert deferred is not None  # law rules are not plain
    return deferred
