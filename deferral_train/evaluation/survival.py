"""Acceptance length from position-by-position survival along real prefixes.

Drafting works in blocks: up to ``num_draft_tokens`` positions are drafted and judged, the next one is filled
by the verifier (resampled after a rejection, bonus after none), and a new block starts behind it. Where a
block starts depends on earlier rejections, and acceptance varies strongly between positions, so the i.i.d.
formula (1 - a^(g+1)) / (1 - a) is wrong. Here the index in the block is a Markov chain over the logged
positions:

    h_t[j] = P(position t is the j-th of its block), j = 0..g, j = g being the bonus position
    h_{t+1}[j+1] = a_t h_t[j]            (accepted)
    h_{t+1}[0]   = (1 - a_t) (1 - h_t[g]) + h_t[g]

The expected number of verifier calls is sum_t h_t[0], one for each block.

When it is exact: ``acceptance`` is P(accept | prefix) = 1 - D_TV(q, pi), independent between positions given
the prefixes. With greedy decoding it is exact on prefixes that the cascade itself produced. When sampling,
acceptance is correlated with the token x that was drawn; P(accept | prefix, x) = min(1, q(x) / pi(x)) makes the
expected number of calls unbiased on prefixes drawn from pi (and exact bonus). On other prefixes it is an
approximation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deferral_train.decoding.settings import Settings
from deferral_train.evaluation.distributions import deferral_and_rejection
from deferral_train.evaluation.positions import Positions, PromptRows
from deferral_train.rules.base import Rule


@dataclass(frozen=True)
class ExpectedWork:
    """Expected work of P prompts under S settings, drafted in blocks of g tokens.

    Attributes:
        calls: [P, S] verifier calls.
        judged_at: [P, S, g] drafted positions that are judged, by draft index.
        rejected_at: [P, S, g] those of them whose token is rejected.
        deferred_at: [P, S, g] those of them that are deferred; None where not asked for.
    """

    calls: np.ndarray
    judged_at: np.ndarray
    rejected_at: np.ndarray
    deferred_at: np.ndarray | None = None

    @property
    def judged(self) -> np.ndarray:
        """[P, S]."""
        return self.judged_at.sum(-1)

    @property
    def rejected(self) -> np.ndarray:
        """[P, S]."""
        return self.rejected_at.sum(-1)

    @property
    def deferred(self) -> np.ndarray | None:
        """[P, S]."""
        return None if self.deferred_at is None else self.deferred_at.sum(-1)

    @staticmethod
    def joined(parts: Sequence[ExpectedWork]) -> ExpectedWork:
        """Prompts of several parts, in order."""
        deferred = [part.deferred_at for part in parts if part.deferred_at is not None]
        return ExpectedWork(
            np.concatenate([part.calls for part in parts]),
            np.concatenate([part.judged_at for part in parts]),
            np.concatenate([part.rejected_at for part in parts]),
            np.concatenate(deferred) if deferred else None,
        )


def expected_work(
    table: Positions,
    rules: Sequence[Rule],
    num_draft_tokens: int = Settings.num_draft_tokens,
    *,
    limit: int | None = None,
    tails: Sequence[float] = (0.0,),
    served: bool = False,
) -> ExpectedWork:
    """Expected work per prompt if each rule decoded the logged sequences; S = rules times tails, tails fastest.

    Args:
        table: with the fields, and for token and distribution rules the candidates, that the rules need.
        rules: at fixed values of their dials.
        limit: of tokens, that the sequences were written under.
        tails: see :func:`deferral_train.evaluation.distributions.deferral_and_rejection`.
        served: blocks lie as serving engines lay them, see :func:`block_chain`.
    """
    parts = []
    for block in table.blocks():
        rates = [deferral_and_rejection(rule, block, tails) for rule in rules]
        deferral, rejection = (np.concatenate(side, axis=1) for side in zip(*rates))
        cut = None if limit is None or served else block.layout.lengths == limit
        parts.append(block_chain(1 - rejection, block.layout, num_draft_tokens, deferral, cut, served))
    return ExpectedWork.joined(parts)


def expected_calls(
    acceptance: np.ndarray, layout: PromptRows, num_draft_tokens: int = Settings.num_draft_tokens
) -> np.ndarray:
    """Expected verifier calls [P, S] of the logged sequences; see :func:`block_chain` for the arguments."""
    calls = np.zeros((len(layout.lengths), acceptance.shape[1]), dtype=acceptance.dtype)
    order = layout.longest_first
    for rows, reached in _walk(acceptance, layout, num_draft_tokens):
        calls[: len(rows)] += reached[0]
    return calls[np.argsort(order)]


def block_chain(
    acceptance: np.ndarray,
    layout: PromptRows,
    num_draft_tokens: int = Settings.num_draft_tokens,
    deferral: np.ndarray | None = None,
    cut: np.ndarray | None = None,
    served: bool = False,
) -> ExpectedWork:
    """Expected calls and decisions of the logged sequences, under S settings at once.

    Args:
        acceptance: [N, S] probability that a draft at this row's position is accepted.
        layout: of the N rows.
        num_draft_tokens: block size g >= 1.
        deferral: [N, S] probability that the position is deferred where it is judged.
        cut: [P] prompts that ended at a limit of tokens. Drafting leaves room for the verifier's own token, so that
            the last position within the limit is never drafted.
        served: as serving engines lay blocks: the verifier gives the first token in a call of its own, and drafting
            leaves no room at the limit.
    """
    shape = (len(layout.lengths), acceptance.shape[1])
    calls = np.full(shape, float(served))
    judged, rejected, deferred = (np.zeros((*shape, num_draft_tokens)) for _ in range(3))
    last = (
        np.full(len(layout.lengths), -1)
        if cut is None
        else np.where(cut, layout.starts + layout.lengths - 1, -1)
    )
    last = last[layout.longest_first]
    for rows, reached in _walk(acceptance, layout, num_draft_tokens, served):
        running = slice(len(rows))
        calls[running] += reached[0]
        drafted = np.where((rows == last[running])[:, None, None], 0, np.moveaxis(reached[:-1], 0, -1))
        judged[running] += drafted
        rejected[running] += drafted * (1 - acceptance[rows])[..., None]
        if deferral is not None:
            deferred[running] += drafted * deferral[rows][..., None]
    back = np.argsort(layout.longest_first)
    return ExpectedWork(
        calls[back], judged[back], rejected[back], None if deferral is None else deferred[back]
    )


def _walk(
    acceptance: np.ndarray, layout: PromptRows, num_draft_tokens: int, served: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Step through positions: (rows [C], h [g+1, C, S]) of the C prompts still running.

    Prompts come longest first, so that the running ones are always a leading part of the state.
    """
    lengths, starts = layout.lengths[layout.longest_first], layout.starts[layout.longest_first]
    running = np.searchsorted(-lengths, -np.arange(lengths.max(initial=0)), side="left")
    reached = np.zeros((num_draft_tokens + 1, len(lengths), acceptance.shape[1]), dtype=acceptance.dtype)
    reached[-1 if served else 0] = 1
    after = np.empty_like(reached)
    for step, count in enumerate(running):
        rows = starts[:count] + step
        accept, now = acceptance[rows], reached[:, :count]
        yield rows, now
        np.multiply(now[:-1], accept, out=after[1:, :count])
        np.subtract(1, (1 - now[-1]) * accept, out=after[0, :count])  # (1-a)(1-h_g) + h_g
        reached, after = after, reached
