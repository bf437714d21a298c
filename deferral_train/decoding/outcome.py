"""What became of a block, on the host: the form in which the loop emits tokens and keeps its books."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.decoding.proposing import Draft
from deferral_train.rules.verify import Origin, Verdict


@dataclass
class Outcome:
    """A judged block, one entry per running row.

    Attributes:
        proposed: drafted tokens.
        accepted: of these, those that stand.
        emitted: the tokens on offer: those that stand, then the correction or the bonus if there is one.
        origins: where each of these comes from.
        deferred: the decision at each proposed place.
        spent: [B] estimated loss so far under a limit, else None.
    """

    proposed: list[int]
    accepted: list[int]
    emitted: list[list[int]]
    origins: list[list[int]]
    deferred: list[list[bool]]
    spent: Tensor | None = None


def outcome_of(verdict: Verdict, draft: Draft) -> Outcome:
    """A verdict's outcome; on a device its parts come over in one transfer."""
    accepted, following, proposed, tokens, origins, deferred = to_host(
        verdict.accepted[:, None], verdict.next_token[:, None], draft.lengths[:, None], draft.tokens,
        verdict.origin, verdict.deferred,
    )  # fmt: skip
    emitted = [
        [*row[:count], token] if token >= 0 else row[:count]
        for row, (count,), (token,) in zip(tokens, accepted, following)
    ]
    return Outcome(
        [row[0] for row in proposed],
        [row[0] for row in accepted],
        emitted,
        [row[: len(new)] for row, new in zip(origins, emitted)],
        [[bool(flag) for flag in row] for row in deferred],
        verdict.spent,
    )


def outcome_greedy(
    best: list[list[int]],
    tokens: list[list[int]],
    proposed: list[int],
    kept: Sequence[Sequence[int]] | None,
    deferred: Sequence[Sequence[int]] | None,
) -> Outcome:
    """The outcome at temperature 0, where nothing is drawn: plain integers cost less than small tensors.

    Args:
        best: the verifier's favourite token at each place and after the last, [B][T+1].
        tokens: drafted, [B][T].
        proposed: [B].
        kept: drafted tokens that stand whatever the verifier's favourite is, [B][T]; None for none.
        deferred: the decisions, [B][T]; None for all.
    """
    outcome = Outcome(proposed, [], [], [], [])
    kept_origin, same_origin = int(Origin.KEPT), int(Origin.ACCEPTED)
    for row, (favourites, drafted, length) in enumerate(zip(best, tokens, proposed)):
        keeps = kept[row] if kept is not None else None
        origins: list[int] = []
        for place in range(length):
            if keeps is not None and keeps[place]:
                origins.append(kept_origin)
            elif drafted[place] == favourites[place]:
                origins.append(same_origin)
            else:
                break
        count = len(origins)
        origins.append(int(Origin.RESAMPLED) if count < length else int(Origin.BONUS))
        outcome.accepted.append(count)
        outcome.emitted.append([*drafted[:count], favourites[count]])
        outcome.origins.append(origins)
        outcome.deferred.append(
            [True] * length if deferred is None else [bool(flag) for flag in deferred[row][:length]]
        )
    return outcome


def to_host(*columns: Tensor) -> list[list[list[int]]]:
    """Integer or boolean tensors [B, k] as lists; one transfer, and so one wait, from a device."""
    if columns[0].device.type == "cpu":
        return [column.tolist() for column in columns]
    widths = [column.shape[1] for column in columns]
    rows = torch.cat([column.long() for column in columns], dim=1).tolist()
    ends = [sum(widths[: place + 1]) for place in range(len(widths))]
    return [[row[end - width : end] for row in rows] for end, width in zip(ends, widths)]
