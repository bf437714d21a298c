"""Acceptance length from position-by-position survival along real prefixes.

Drafting works in blocks: up to ``num_draft_tokens`` positions are drafted and judged, the next one is filled
by the verifier (resampled after a rejection, bonus after none), and a new block starts behind it. Where a
block starts depends on earlier rejections, and acceptance varies strongly between positions, so the i.i.d.
formula (1 - a^(g+1)) / (1 - a) is wrong. Here the place in the block is a Markov chain over the logged
positions:

    h_t[j] = P(position t is the j-th of its block), j = 0..g, j = g being the bonus position
    h_{t+1}[j+1] = a_t h_t[j]            (accepted)
    h_{t+1}[0]   = (1 - a_t) (1 - h_t[g]) + h_t[g]

The expected number of verifier calls is sum_t h_t[0], one for each block.

When it is exact: ``acceptance`` is P(accept | prefix) = 1 - D_TV(q, pi), independent between positions given
the prefixes. With greedy decoding it is exact on prefixes that the cascade itself produced. When sampling,
acceptance is correlated with the token that was drawn; :func:`acceptance_given_token` conditions on it,
which makes the expected number of calls unbiased on prefixes drawn from pi (and exact bonus). On other
prefixes it is an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Where the rows of each prompt lie: rows are sorted by prompt, and by position within a prompt.

    Attributes:
        starts: [P] first row of each prompt. lengths: [P] rows of each prompt.
    """

    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, prompt: np.ndarray) -> Layout:
        """From sorted prompt numbers [N]; every number from 0 to the last must occur."""
        starts = np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1]]) if len(prompt) else np.zeros(0, int)
        return cls(starts, np.diff(np.r_[starts, len(prompt)]))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the rows of each prompt: [.., N] to [.., P]."""
        return np.add.reduceat(values, self.starts, axis=-1)

    @cached_property
    def longest_first(self) -> np.ndarray:
        """Prompts in order of falling length, [P]."""
        return np.argsort(-self.lengths, kind="stable")


@dataclass(frozen=True)
class Blocks:
    """Expected work of P prompts under S settings: verifier ``calls`` [P, S] and, each [P, S, g] by place in the
    block, drafted positions that are ``judged``, ``rejected`` ones and, where asked for, ``deferred`` ones among
    the judged."""

    calls: np.ndarray
    judged_at: np.ndarray
    rejected_at: np.ndarray
    deferred_at: np.ndarray | None = None

    @cached_property
    def judged(self) -> np.ndarray:
        """[P, S]."""
        return self.judged_at.sum(-1)

    @cached_property
    def rejected(self) -> np.ndarray:
        """[P, S]."""
        return self.rejected_at.sum(-1)

    @cached_property
    def deferred(self) -> np.ndarray | None:
        """[P, S]."""
        return None if self.deferred_at is None else self.deferred_at.sum(-1)


def expected_calls(acceptance: np.ndarray, layout: Layout, num_draft_tokens: int = 5) -> np.ndarray:
    """Expected verifier calls [P, S] of the logged sequences; see :func:`block_chain` for the arguments."""
    calls = np.zeros((len(layout.lengths), acceptance.shape[1]), dtype=acceptance.dtype)
    order = layout.longest_first
    for rows, place, _ in _walk(acceptance, layout, num_draft_tokens):
        calls[: len(rows)] += place[0]
    return calls[np.argsort(order)]


def block_chain(
    acceptance: np.ndarray,
    layout: Layout,
    num_draft_tokens: int = 5,
    deferral: np.ndarray | None = None,
    cut: np.ndarray | None = None,
) -> Blocks:
    """Expected calls and decisions of the logged sequences, under S settings at once.

    Args:
        acceptance: [N, S] probability that a draft at this row's position is accepted.
        layout: of the N rows.
        num_draft_tokens: block size g >= 1.
        deferral: [N, S] probability that the position is deferred where it is judged.
        cut: [P] prompts that ended at a limit of tokens. Drafting leaves room for the verifier's own token,
            so
            that the last position within the limit is never drafted.
    """
    shape = (len(layout.lengths), acceptance.shape[1])
    calls = np.zeros(shape, dtype=np.float64)
    judged, rejected, deferred = (np.zeros((*shape, num_draft_tokens)) for _ in range(3))
    last = (
        np.full(len(layout.lengths), -1)
        if cut is None
        else np.where(cut, layout.starts + layout.lengths - 1, -1)
    )
    last = last[layout.longest_first]
    for rows, place, _ in _walk(acceptance, layout, num_draft_tokens):
        running = slice(len(rows))
        calls[running] += place[0]
        drafted = np.where((rows == last[running])[:, None, None], 0, np.moveaxis(place[:-1], 0, -1))
        judged[running] += drafted
        rejected[running] += drafted * (1 - acceptance[rows])[..., None]
        if deferral is not None:
            deferred[running] += drafted * deferral[rows][..., None]
    back = np.argsort(layout.longest_first)
    return Blocks(calls[back], judged[back], rejected[back], None if deferral is None else deferred[back])


def _walk(
    acceptance: np.ndarray, layout: Layout, num_draft_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Step through positions: (rows [C], h [g+1, C, S], drafted = 1 - h[g] [C, S]) of the C prompts still
    running.

    Prompts come longest first, so that the running ones are always a leading part of the state.
    """
    lengths, starts = layout.lengths[layout.longest_first], layout.starts[layout.longest_first]
    running = np.searchsorted(-lengths, -np.arange(lengths.max(initial=0)), side="left")
    place = np.zeros((num_draft_tokens + 1, len(lengths), acceptance.shape[1]), dtype=acceptance.dtype)
    place[0] = 1
    after = np.empty_like(place)
    for step, count in enumerate(running):
        rows = starts[:count] + step
        accept, now = acceptance[rows], place[:, :count]
        drafted = 1 - now[-1]
        yield rows, now, drafted
        np.multiply(now[:-1], accept, out=after[1:, :count])
        np.subtract(1, drafted * accept, out=after[0, :count])  # (1-a)(1-h_g) + h_g
        place, after = after, place


def acceptance_given_token(drafter_prob: np.ndarray, target_prob: np.ndarray) -> np.ndarray:
    """P(accept | prefix, emitted token x) = min(1, q(x) / pi(x)) for a token drawn from pi, any common shape.

    From P(accept and x) = min(q, pi)(x) and P(x) = pi(x). Its mean over x ~ pi is 1 - D_TV(q, pi).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(target_prob > 0, drafter_prob / target_prob, 1.0)
    return np.minimum(share, 1.0)


def relative_latency(calls_per_token: np.ndarray, costs: Mapping[str, float]) -> np.ndarray:
    """Predicted time against the verifier alone, from measured seconds of one pass; any shape.

    A block costs verifier + num_draft_tokens * drafter + head; the verifier alone costs verifier_token per
    token.

    Args:
        costs: ``drafter`` and ``verifier``, seconds of one drafter step and one verifying pass,
            ``num_draft_tokens``, optional ``verifier_token`` (default ``verifier``) and ``head`` per block.
    """
    block = costs["verifier"] + costs["num_draft_tokens"] * costs["drafter"] + costs.get("head", 0.0)
    return calls_per_token * block / costs.get("verifier_token", costs["verifier"])
