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

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Where rows sorted by prompt go in a padded [prompts, positions] grid.

    Args:
        prompt: [N] prompt number of each row, 0-based and sorted; rows of one prompt in order of position.
        starts: [P] first row of each prompt. lengths: [P] rows of each prompt.
    """

    prompt: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, prompt: np.ndarray) -> Layout:
        """From sorted prompt numbers [N]; every number from 0 to the last must occur."""
        starts = np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1]]) if len(prompt) else np.zeros(0, int)
        return cls(prompt, starts, np.diff(np.r_[starts, len(prompt)]))


@dataclass(frozen=True)
class Blocks:
    """Expected work per prompt, each [.., P]: verifier ``calls``, ``judged`` drafted positions, ``rejected``
    ones.
    """

    calls: np.ndarray
    judged: np.ndarray
    rejected: np.ndarray


def block_chain(acceptance: np.ndarray, layout: Layout, num_draft_tokens: int = 5) -> Blocks:
    """Expected verifier calls for the logged sequences.

    Args:
        acceptance: [.., N] probability that a draft at this row's position is accepted.
        layout: of the N rows.
        num_draft_tokens: block size g >= 1.

    Prompts are walked longest first, so that at step t the ones still running are a prefix of the array.
    """
    lead = acceptance.shape[:-1]
    flat = acceptance.reshape(-1, acceptance.shape[-1])
    order = np.argsort(-layout.lengths, kind="stable")
    lengths, starts = layout.lengths[order], layout.starts[order]
    running = np.searchsorted(-lengths, -np.arange(lengths.max(initial=0)), side="left")
    calls, judged, rejected = (np.zeros((len(lengths), len(flat)), dtype=np.float64) for _ in range(3))
    by_row = np.ascontiguousarray(flat.T)
    place = [np.zeros((len(lengths), len(flat)), dtype=by_row.dtype) for _ in range(num_draft_tokens + 1)]
    place[0][:] = 1
    for step, count in enumerate(running):
        accept = by_row[starts[:count] + step]
        place = [part[:count] for part in place]
        drafted = 1 - place[-1]
        turned = drafted * (1 - accept)
        calls[:count] += place[0]
        judged[:count] += drafted
        rejected[:count] += turned
        place = [turned + place[-1], *(part * accept for part in place[:-1])]
    back = np.argsort(order)
    return Blocks(*(part[back].T.reshape(*lead, len(lengths)) for part in (calls, judged, rejected)))


def acceptance_given_token(drafter_prob: np.ndarray, target_prob: np.ndarray) -> np.ndarray:
    """P(accept | prefix, emitted token x) = min(1, q(x) / pi(x)) for a token drawn from pi, any common shape.

    From P(accept and x) = min(q, pi)(x) and P(x) = pi(x). Its mean over x ~ pi is 1 - D_TV(q, pi).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(target_prob > 0, drafter_prob / target_prob, 1.0)
    return np.minimum(share, 1.0)


def relative_latency(
    calls: np.ndarray, judged: np.ndarray, tokens: np.ndarray, costs: dict[str, float]
) -> np.ndarray:
    """Predicted time against the verifier alone, from measured costs of one pass.

    time = calls * (verifier + num_draft_tokens * drafter + head) ; verifier alone = tokens * verifier_token.

    Args:
        costs: ``drafter`` and ``verifier`` seconds of one drafter step and one verifying pass,
            ``num_draft_tokens``,
            optional ``verifier_token`` (one-token verifier step, default ``verifier``) and ``head`` per
            block.
    """
    block = costs["verifier"] + costs["num_draft_tokens"] * costs["drafter"] + costs.get("head", 0.0)
    alone = costs.get("verifier_token", costs["verifier"])
    return calls * block / (tokens * alone)
