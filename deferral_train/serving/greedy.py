"""Greedy rows on a CPU: verified from argmaxes and a few numbers a position, in NumPy.

At temperature 0 laws are one-hots: a drafted token stands iff the rule keeps it or it is the verifier's argmax, and the
correction is the verifier's argmax. `rules.verify_block` gives the same, which the tests check for every rule; what
is not known here goes there. R rows, T drafted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Origin, Rule
from deferral_train.rules.quick import GreedyBlocks
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
    tokens, counts, logits = drafted.numpy(), lengths.numpy(), verifier.numpy()
    steps, every = np.arange(tokens.shape[1]), np.arange(len(counts))
    inside = steps < counts[:, None]
    best = logits.argmax(axis=-1)  # of a position with NaN: where it is
    finite = np.isfinite(logits[every[:, None], steps, best])
    if not (finite.all() or finite[inside].all()):
        raise ElsewhereError
    exact = tokens == best
    if rule.is_lossless:
        accepted = _until_first(exact, inside)
        kept, deferred, loss = np.zeros_like(exact), inside, np.zeros(len(counts))
    else:
        differing = np.flatnonzero(~exact & inside)
        deferred, costs = _decisions(rule, tokens, drafter, logits, best, inside, differing, context)
        kept = ~deferred
        if len(differing):  # the verifier's favourite is allowed
            kept &= exact | (logits[every[:, None], steps, tokens] > -np.inf)
        accepted, kept, loss = _walk(exact, kept, costs, inside, limit, spent)
        deferred = deferred & inside
    whole = accepted == counts
    origin = np.zeros((len(counts), tokens.shape[1] + 1), dtype=np.int8)
    origin[:, :-1] = np.where(kept, int(Origin.KEPT), int(Origin.ACCEPTED)) * (steps < accepted[:, None])
    origin[every, accepted] = np.where(whole, int(Origin.NONE), int(Origin.RESAMPLED))
    return {
        "accepted": accepted,
        "correction": np.where(whole, -1, best[every, np.minimum(accepted, len(steps) - 1)]),
        "origin": origin,
        "deferred": deferred,
        "loss": loss,
    }


@lru_cache(maxsize=64)
def _ready(rule: Rule) -> tuple[GreedyBlocks, frozenset[str]]:
    """A rule made ready, and the context that it reads."""
    return GreedyBlocks(rule, with_gap=True), (rule.needs | rule.gap_needs) & CONTEXT_FIELDS


def _decisions(
    rule: Rule,
    tokens: np.ndarray,
    drafter: Tensor | None,
    verifier: np.ndarray,
    best: np.ndarray,
    inside: np.ndarray,
    differing: np.ndarray,
    context: Mapping[str, Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are deferred and the estimated loss of keeping, [R, T] each; beyond a row's length anything.

    Args:
        best: the verifier's argmaxes. differing: flat positions inside the rows' lengths that have another token.
    """
    ready, reads = _ready(rule)
    if "draft_position" in reads and "draft_position" not in context:
        place = torch.arange(tokens.shape[1]).expand(tokens.shape)
        context = {"draft_position": place, **context}
    if drafter is None or not reads <= context.keys() or drafter.device.type != "cpu":
        raise ElsewhereError
    drafter = drafter if drafter.dtype == torch.float64 == verifier.dtype else drafter.float()
    liked = drafter.numpy().argmax(axis=-1)
    other = liked != tokens
    if other.any() and (other & inside).any():
        raise ElsewhereError  # the rules say more of a token that is not the drafter's favourite
    given = {name: context[name] for name in reads}
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            found = ready.judged([drafter], verifier, best, liked, differing.tolist(), given)
    except InputError:
        found = None
    if found is None:
        raise ElsewhereError
    return found[0], np.maximum(found[1], 0.0)


def _until_first(passes: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How many positions of each row pass before the first that does not [R]."""
    return np.logical_and.accumulate(passes & inside, axis=1).sum(axis=1)


def _walk(
    exact: np.ndarray,
    kept: np.ndarray,
    costs: np.ndarray,
    inside: np.ndarray,
    limit: float | None,
    spent: Sequence[float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accepted tokens [R], kept tokens that the limit allows [R, T] and what those that stand cost [R]; as
    `rules.limit.walk`, where a cost that is not finite is never within a limit.
    """
    if limit is None:
        kept = kept & (costs <= UNLIMITED)
        accepted = _until_first(kept | exact, inside)
        stand = np.arange(kept.shape[1]) < accepted[:, None]
        return accepted, kept, np.where(stand & kept, costs, 0.0).sum(axis=1)
    begun = np.asarray(spent, dtype=float)
    total, kept = begun.copy(), kept.copy()
    alive, accepted = np.ones(len(spent), dtype=bool), np.zeros(len(spent), dtype=np.int64)
    for step in range(kept.shape[1]):
        kept[:, step] &= (total < limit) & (total + costs[:, step] <= limit)
        alive &= inside[:, step] & (kept[:, step] | exact[:, step])
        total += np.where(alive & kept[:, step], costs[:, step], 0.0)
        accepted += alive
    return accepted, kept, total - begun
