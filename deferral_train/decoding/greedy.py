"""Verification at temperature 0 from argmaxes alone.

Greedy laws are one-hots: a drafted token stands iff the rule keeps it or it is the verifier's argmax, and whatever
follows the accepted tokens is the verifier's argmax, be it a correction or a bonus. Gives what ``verify_block``
gives, which the tests check for every rule; anything else goes there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.outcome import Outcome, outcome_greedy, to_host
from deferral_train.decoding.proposing import Draft
from deferral_train.errors import InputError
from deferral_train.rules.base import LawRule, Rule
from deferral_train.rules.laws import Laws, lowest_argmax
from deferral_train.rules.quick import GreedyBlocks, on_host
from deferral_train.rules.scoring import decide
from deferral_train.rules.summary import Summary

NOT_FINITE = "the verifier's logits are NaN or infinite; check its weights and number format"


def is_plain(rule: Rule, bonus: str, max_request_loss: float | None, sampling: Tensor | None) -> bool:
    """Whether greedy verification needs no more than argmaxes and the rule's decision."""
    if sampling is not None or max_request_loss is not None:
        return False
    return rule.is_lossless or (bonus == "verifier" and not isinstance(rule, LawRule))


def judge_greedy(
    rule: Rule,
    draft: Draft,
    verifier_logits: Tensor,
    context: Summary | None,
    ready: GreedyBlocks | None = None,
) -> Outcome:
    """The outcome of a block at temperature 0, where :func:`is_plain` holds.

    Args:
        verifier_logits: decision logits [B, T+1, V].
        context: what the rule reads beside logits.
        ready: the rule, made ready before.

    Raises:
        InputError: logits that are not finite.
    """
    if draft.on_host is not None and isinstance(draft.proposed, list) and on_host(verifier_logits):
        return _judge_on_host(rule, draft, draft.on_host, draft.proposed, verifier_logits, context, ready)
    best = lowest_argmax(verifier_logits)
    top = verifier_logits.amax(dim=-1)  # NaN where there is one
    columns = [best, torch.isfinite(top)]
    decides = not rule.is_lossless and draft.depth > 0
    if decides:
        columns += decisions(rule, draft, verifier_logits, context)
    found = to_host(*columns, draft.tokens, draft.lengths[:, None])
    if not all(all(row) for row in found[1]):
        raise InputError(NOT_FINITE)
    deferrals, kept = (found[2], found[3]) if decides else (None, None)
    return outcome_greedy(found[0], found[-2], [row[0] for row in found[-1]], kept, deferrals)


def _judge_on_host(
    rule: Rule,
    draft: Draft,
    tokens: list[list[int]],
    proposed: list[int],
    verifier_logits: Tensor,
    context: Summary | None,
    ready: GreedyBlocks | None,
) -> Outcome:
    """The same from arrays and lists alone: a block's few numbers cost less there than as small tensors."""
    verifier = verifier_logits.numpy()
    best = verifier.argmax(axis=-1)
    favourites = best.tolist()
    for logits, tops in zip(verifier, favourites):
        if not math.isfinite(sum([logits[place, top].item() for place, top in enumerate(tops)])):
            raise InputError(NOT_FINITE)
    kept = deferred = None
    if not rule.is_lossless and draft.depth > 0:
        ready = ready or GreedyBlocks(rule)
        deferred, kept = decisions_on_host(ready, draft, tokens, verifier, best, favourites, context)
    return outcome_greedy(favourites, tokens, proposed, kept, deferred)


def decisions_on_host(
    ready: GreedyBlocks,
    draft: Draft,
    tokens: list[list[int]],
    verifier: Any,
    best: Any,
    favourites: list[list[int]],
    context: Summary | None,
) -> tuple[list[list[bool]], list[list[bool]]]:
    """All that a rule costs on a CPU: which drafted tokens are deferred, and which stand by its leave, [B][T]."""
    depth = draft.depth
    differing = [
        row * depth + place
        for row, (drafted, liked) in enumerate(zip(tokens, favourites))
        for place, (token, favourite) in enumerate(zip(drafted, liked))
        if token != favourite
    ]
    found = ready.deferred(draft.decisions, verifier, best, draft.tokens, differing, context)
    if found is None:
        columns = decisions(ready.rule, draft, torch.from_numpy(verifier), context)
        return columns[0].tolist(), columns[1].tolist()
    deferred = found.tolist()
    kept = [[not flag for flag in flags] for flags in deferred]
    for n in differing:  # the verifier's favourite is allowed
        row, place = divmod(n, depth)
        if verifier[row, place, tokens[row][place]] == -math.inf:
            kept[row][place] = False
    return deferred, kept


def decisions(rule: Rule, draft: Draft, verifier_logits: Tensor, context: Summary | None) -> list[Tensor]:
    """The same from whole laws, as tensors [B, T]."""
    depth = draft.depth
    drafter, verifier = draft.logits[:, :depth], verifier_logits[:, :depth]
    if context is not None:
        context = Summary({name: context[name][:, :depth] for name in context.names})
    laws = Laws.of(drafter, verifier, 0.0)
    deferred = decide(rule, laws, rule.read(laws, draft.tokens, context), draft.tokens)
    assert deferred is not None  # law rules are not plain
    allowed = verifier.gather(2, draft.tokens[..., None])[..., 0] > -torch.inf
    return [deferred, ~deferred & allowed]
