"""Verification at temperature 0 from argmaxes alone.

Greedy laws are one-hots: a drafted token stands iff the rule keeps it or it is the verifier's argmax, and whatever
follows the accepted tokens is the verifier's argmax, be it a correction or a bonus. Gives what ``verify_block``
gives, which the tests check for every rule; anything else goes there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.outcome import Outcome, outcome_greedy, to_host
from deferral_train.decoding.proposing import Draft
from deferral_train.errors import InputError
from deferral_train.rules import quick
from deferral_train.rules.base import LawRule, PositionRule, Rule
from deferral_train.rules.laws import Laws, lowest_argmax
from deferral_train.rules.scoring import decide
from deferral_train.rules.summary import CONTEXT_FIELDS, Summary


def is_plain(rule: Rule, bonus: str, max_request_loss: float | None, sampling: Tensor | None) -> bool:
    """Whether greedy verification needs no more than argmaxes and the rule's decision."""
    if sampling is not None or max_request_loss is not None:
        return False
    return rule.is_lossless or (bonus == "verifier" and not isinstance(rule, LawRule))


def judge_greedy(rule: Rule, draft: Draft, verifier_logits: Tensor, context: Summary | None) -> Outcome:
    """The outcome of a block at temperature 0, where :func:`is_plain` holds.

    Args:
        verifier_logits: decision logits [B, T+1, V].
        context: what the rule reads beside logits.

    Raises:
        InputError: logits that are not finite.
    """
    depth = draft.depth
    best = lowest_argmax(verifier_logits)
    top = verifier_logits.amax(dim=-1)  # NaN where there is one
    columns = [best, torch.isfinite(top)]
    decides = not rule.is_lossless and depth > 0
    if decides:
        columns += decisions(rule, draft, verifier_logits, context)
    if draft.on_host is None or not isinstance(draft.proposed, list):
        columns += [draft.tokens, draft.lengths[:, None]]
    found = to_host(*columns)
    if not all(all(row) for row in found[1]):
        raise InputError("the verifier's logits are NaN or infinite; check its weights and number format")
    deferrals, kept = (found[2], found[3]) if decides else (None, None)
    if draft.on_host is not None and isinstance(draft.proposed, list):
        return outcome_greedy(found[0], draft.on_host, draft.proposed, kept, deferrals)
    return outcome_greedy(found[0], found[-2], [row[0] for row in found[-1]], kept, deferrals)


def decisions(rule: Rule, draft: Draft, verifier_logits: Tensor, context: Summary | None) -> list[Tensor]:
    """All that a rule costs here: which drafted tokens are deferred, and which stand by its leave; bool [B, T]."""
    depth = draft.depth
    drafter, verifier = draft.logits[:, :depth], verifier_logits[:, :depth]
    if context is not None:
        context = Summary({name: context[name][:, :depth] for name in context.names})
    if isinstance(rule, PositionRule) and quick.knows(rule.needs - CONTEXT_FIELDS, drafter, verifier):
        summary = quick.summarize_greedy(rule.needs - CONTEXT_FIELDS, drafter, verifier, draft.tokens)
        deferred = rule.defer(summary if context is None else summary.with_fields(context))
        deferred = deferred.expand(draft.tokens.shape)
    else:
        laws = Laws.of(drafter, verifier, 0.0)
        found = decide(rule, laws, rule.read(laws, draft.tokens, context), draft.tokens)
        assert found is not None  # law rules are not plain
        deferred = found
    allowed = verifier.gather(2, draft.tokens[..., None])[..., 0] > -torch.inf
    return [deferred, ~deferred & allowed]
