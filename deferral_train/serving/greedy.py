"""Greedy rows on a CPU: verified from argmaxes and a few numbers a position, in NumPy.

At temperature 0 laws are one-hots: a drafted token stands iff the rule keeps it or it is the verifier's argmax, and the
correction is the verifier's argmax. `rules.verify_block` gives the same, which the tests check for every rule; what
is not known here goes there. R rows, T drafted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Origin, Rule, TokenRule, quick
from deferral_train.rules.summary import CONTEXT_FIELDS

UNLIMITED = 1e30  # a limit nobody reaches: what it costs is counted, nothing is refused


class ElsewhereError(Exception):
    """These rows are for `verify_block`."""


def verify_greedy(
    rule: Rule,
    drafted: Tensor,
    drafter: Tensor | None,
    verifier: Tensor,
    lengths: Tensor,
    context: Mapping[str, Tensor],
    limit: float | None,
    spent: Sequence[float],
) -> dict[str, Any]:
    """What happens to each row: ``accepted``, ``correction`` (-1 where the block stands whole), ``origin``,
    ``deferred`` and ``loss`` as arrays, by the names of `blocks.Outcome`.

    Args:
        drafted, lengths: [R, T], [R] int64. drafter, verifier: logits [R, T, V]; no drafter where it has no law.
        context: summary fields that logits do not give. limit, spent: on the estimated loss and of it, by row.

    Raises:
        ElsewhereError: another device or number format, a rule whose decision needs more than `rules.quick` reads,
            logits that are not finite.
    """
    if verifier.device.type != "cpu" or verifier.dtype not in (torch.float32, torch.float64):
        raise ElsewhereError
    tokens, counts = drafted.numpy(), lengths.numpy()
    inside = np.arange(tokens.shape[1]) < counts[:, None]
    if rule.is_lossless:
        best = _finite_argmax(verifier, inside)
        passes = tokens == best
        accepted = _until_first(passes, inside)
        kept, deferred, loss = np.zeros_like(passes), inside, np.zeros(len(counts))
    else:
        best, deferred, kept, gap = _decisions(rule, tokens, drafter, verifier, context)
        deferred &= inside
        accepted, kept, loss = _walk(tokens == best, kept, gap, inside, limit, np.asarray(spent, dtype=float))
    whole = accepted == counts
    last = np.minimum(accepted, tokens.shape[1] - 1)
    every = np.arange(len(counts))
    origin = np.zeros((len(counts), tokens.shape[1] + 1), dtype=np.int8)
    emitted = np.arange(tokens.shape[1]) < accepted[:, None]
    origin[:, :-1] = np.where(emitted, np.where(kept, int(Origin.KEPT), int(Origin.ACCEPTED)), 0)
    origin[every, accepted] = np.where(whole, int(Origin.NONE), int(Origin.RESAMPLED))
    correction = np.where(whole, -1, best[every, last])
    return {
        "accepted": accepted,
        "correction": correction,
        "origin": origin,
        "deferred": deferred,
        "loss": loss,
    }


def _finite_argmax(verifier: Tensor, inside: np.ndarray) -> np.ndarray:
    """The argmax of each position [R, T]."""
    rows = verifier.numpy()
    best = rows.argmax(axis=-1)  # of a position with NaN: where it is
    highest = rows.max(axis=-1)
    if not (np.isfinite(highest) | ~inside).all():
        raise ElsewhereError
    return best


def _decisions(
    rule: Rule, tokens: np.ndarray, drafter: Tensor | None, verifier: Tensor, context: Mapping[str, Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The verifier's argmaxes, which tokens are deferred, which stand by the rule's leave, and the estimated loss of
    keeping, all [R, T].
    """
    extra = rule.gap_needs | {"drafter_argmax", "verifier_argmax"}
    given = (rule.needs | extra) & CONTEXT_FIELDS
    if "draft_position" in given:
        place = torch.arange(tokens.shape[1]).expand(tokens.shape)
        context = {"draft_position": place, **context}
    if drafter is None or not given <= set(context):
        raise ElsewhereError
    drafter = drafter.to(verifier.dtype)
    if not quick.decides(rule, drafter, verifier, extra):
        raise ElsewhereError
    try:
        decided, summary = quick.decide(rule, drafter, verifier, torch.from_numpy(tokens), context, extra)
    except InputError:
        raise ElsewhereError from None
    if isinstance(rule, TokenRule) and not np.array_equal(summary["drafter_argmax"].numpy(), tokens):
        raise ElsewhereError  # the law of a token rule says more of one that is not the drafter's favourite
    deferred, at = decided.numpy(), np.arange(tokens.size) * verifier.shape[-1] + tokens.reshape(-1)
    allowed = verifier.reshape(-1).numpy()[at].reshape(tokens.shape) > -np.inf
    costs = np.maximum(rule.estimated_gap(summary).expand(tokens.shape).numpy().astype(float), 0.0)
    return summary["verifier_argmax"].numpy(), deferred, ~deferred & allowed, costs


def _until_first(passes: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How many positions of each row pass before the first that does not [R]."""
    return np.logical_and.accumulate(passes & inside, axis=1).sum(axis=1)


def _walk(
    exact: np.ndarray,
    kept: np.ndarray,
    costs: np.ndarray,
    inside: np.ndarray,
    limit: float | None,
    spent: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accepted tokens [R], kept tokens that the limit allows [R, T] and what those that stand cost [R]; as
    `rules.limit.walk`, where a cost that is not finite is never within a limit.
    """
    if limit is None:
        kept = kept & (costs <= UNLIMITED)
        accepted = _until_first(kept | exact, inside)
        stand = np.arange(kept.shape[1]) < accepted[:, None]
        return accepted, kept, np.where(stand & kept, costs, 0.0).sum(axis=1)
    total, kept = spent.copy(), kept.copy()
    alive, accepted = np.ones(len(spent), dtype=bool), np.zeros(len(spent), dtype=np.int64)
    for step in range(kept.shape[1]):
        kept[:, step] &= (total < limit) & (total + costs[:, step] <= limit)
        alive &= inside[:, step] & (kept[:, step] | exact[:, step])
        total += np.where(alive & kept[:, step], costs[:, step], 0.0)
        accepted += alive
    return accepted, kept, total - spent
