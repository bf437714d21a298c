"""The threshold of the cumulative and of the acceptance stop, fitted on traces: where would drafting have been
fastest?

Inspired by Dynamic Depth Decoding (arXiv 2409.00142), which stops a beam once its summed probability falls below a
threshold; on one chain that is the probability of the block, prod max q, the test of
:class:`~deferral_train.decoding.stopping.CumulativeStop` on greedy drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.drafting.speed import SpeedModel
from deferral_train.errors import InputError
from deferral_train.traces.reader import Traces
from deferral_train.traces.sequence import argmax_summary
from deferral_train.traces.truth import rejection

CANDIDATES = 200


@dataclass(frozen=True)
class StopFit:
    """A fitted threshold.

    Attributes:
        threshold: for ``CumulativeStop``, 0 never stops; for ``AcceptanceStop``, 1 never stops.
        speed: expected tokens per unit of verifier time with it.
        constant: the same without stopping, at the same longest draft.
        drafted: mean tokens drafted with it.
        best_length: constant number of drafted tokens, up to the longest, that is fastest. best_constant: its speed.
    """

    threshold: float
    speed: float
    constant: float
    drafted: float
    best_length: int
    best_constant: float


def fit_cumulative(
    traces: Traces | Sequence[Traces], cost: float, longest: int = 10, temperature: float | None = None
) -> StopFit:
    """Fit on the rows of traces, as if a block began at each of them.

    Along a trace the drafter's confidence behind a token that was rejected is that of the trace's prefix, not of
    the drafter's own: right up to the first rejection, an approximation beyond, where only cost is at stake.

    Args:
        traces: one or several of a pair; best with the verifier's prefixes, which is what decoding walks along.
        cost: time of a drafter pass over a verifier pass.
        longest: most tokens of a draft.
        temperature: of the sampling distributions, default that of the traces.

    Raises:
        InputError: a cost or a length that cannot be meant.
    """
    parts = [traces] if isinstance(traces, Traces) else list(traces)
    summaries = [part.summary(["drafter_max", "tv"], temperature) for part in parts]
    # Numbers of their own: the first prompt of a folder must not go on where the last of another ended.
    prompts = [
        torch.from_numpy(part.prompt_of_row.copy()).long() * len(parts) + number
        for number, part in enumerate(parts)
    ]
    confidence, tv = (torch.cat([one[name] for one in summaries]) for name in ("drafter_max", "tv"))
    return fit_chains(confidence, 1 - tv, torch.cat(prompts), cost, longest)


def fit_acceptance(
    head: Any, traces: Traces, cost: float, longest: int = 10, temperature: float | None = None
) -> StopFit:
    """The threshold h of :class:`~deferral_train.decoding.stopping.AcceptanceStop` for a judge head of the draft stage.

    A block goes on while prod p^ >= 1 - h. Arguments and errors as for :func:`fit_cumulative`; traces on which the
    head was not fitted.

    Raises:
        InputError: also a head that predicts no acceptance.
    """
    if getattr(head, "stage", None) != "draft" or not callable(getattr(head, "score", None)):
        raise InputError(
            "head predicts no acceptance at the draft stage; fit a judge head with stage 'draft'"
        )
    drafted = (
        traces.manifest.prefixes == "drafter"
    )  # else the drafter's argmax stands for what it would draft
    fields = Traces.summary if drafted else argmax_summary
    predicted = head.score(fields(traces, head.features))
    prompts = torch.from_numpy(traces.prompt_of_row.copy())
    found = fit_chains(predicted, 1 - rejection(traces, temperature), prompts, cost, longest)
    return replace(found, threshold=1 - found.threshold)


def fit_chains(confidence: Tensor, acceptance: Tensor, prompt: Tensor, cost: float, longest: int) -> StopFit:
    """The same from columns [N]: max q, the chance that the drafted token is accepted, and the prompt of each row."""
    if not 0 < cost < float("inf"):
        raise InputError(f"cost is {cost}; give drafter time / verifier time, above 0")
    if longest < 1:
        raise InputError(f"longest is {longest}; a draft has at least 1 token")
    if not len(prompt):
        raise InputError("traces have no rows; collect some first")
    inside = _chains(torch.ones(len(prompt), dtype=torch.float64), prompt, longest)
    certain = _chains(confidence.double(), prompt, longest).cumprod(dim=1)
    reach = _chains(acceptance.double(), prompt, longest).cumprod(dim=1)
    values = certain[inside > 0].unique()
    places = torch.linspace(0, len(values) - 1, min(CANDIDATES, len(values))).long()
    candidates = (0.0, *values[places].tolist(), 1.0)
    model = SpeedModel.of_passes(drafter=cost, verifier=1.0)
    found = [_speed(threshold, certain, reach, inside, model) for threshold in candidates]
    best = max(found)
    constants = [
        _speed(0.0, certain[:, :length], reach[:, :length], inside[:, :length], model)[0]
        for length in range(1, longest + 1)
    ]
    fastest = max(range(longest), key=lambda place: constants[place])
    return StopFit(best[2], best[0], found[0][0], best[1], fastest + 1, constants[fastest])


def _chains(column: Tensor, prompt: Tensor, longest: int) -> Tensor:
    """[N, longest]: the column at each row and at the rows behind it of the same prompt, then 0."""
    chains = torch.zeros(len(column), longest, dtype=column.dtype)
    for ahead in range(min(longest, len(column))):
        stop = len(column) - ahead
        chains[:stop, ahead] = torch.where(prompt[ahead:] == prompt[:stop], column[ahead:], 0.0)
    return chains


def _speed(
    threshold: float, certain: Tensor, reach: Tensor, inside: Tensor, model: SpeedModel
) -> tuple[float, float, float]:
    """(tokens per verifier time, tokens drafted, threshold): a token is drafted if no earlier one ended the block."""
    before = torch.cat([torch.ones_like(certain[:, :1]), certain[:, :-1]], dim=1)
    drafted = (before >= threshold).double() * inside
    tokens, count = 1 + (drafted * reach).sum(dim=1), drafted.sum(dim=1)
    return float(tokens.sum() / model.round(count.numpy()).sum()), float(count.mean()), threshold
