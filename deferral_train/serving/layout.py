"""A step's drafted positions: where they lie in the engine's flat layout, and what was generated before each.

N drafted positions of a step, R rows with drafts, T drafted positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deferral_train.serving.requests import ServedRequest


@dataclass
class Step:
    """One engine step with drafted tokens.

    Attributes:
        members: rows of the batch that have drafts. names, requests: theirs.
        drafted: [R, T] int64 and lengths: [R] int64, on the host. counts: drafted positions in the engine's layout,
            per member.
        temperatures: per member. generators: random stream of a member with a seed, by place among the members.
        cut: members whose block ends at an id that the engine marked invalid.
    """

    members: list[int]
    names: list[str]
    requests: list[ServedRequest]
    drafted: np.ndarray
    lengths: np.ndarray
    counts: list[int]
    temperatures: list[float]
    generators: dict[int, torch.Generator]
    positions: Tensor | None
    cut: list[int] = field(default_factory=list)


def spread(flat: Tensor, counts: list[int]) -> Tensor:
    """Drafted positions [N, ..] of the engine's flat layout as [R, T, ..]; a view where all rows are as long."""
    if min(counts) == max(counts):
        return flat.view(len(counts), counts[0], *flat.shape[1:])
    return flat[torch.from_numpy(places_of(counts)).to(flat.device)]


def spread_host(flat: np.ndarray, counts: list[int]) -> np.ndarray:
    """As `spread`, on the host; always a copy."""
    if min(counts) == max(counts):
        return flat.reshape(len(counts), counts[0]).copy()
    return flat[places_of(counts)]


def places_of(counts: list[int]) -> np.ndarray:
    """Where the positions [R, T] lie in the flat layout; beyond a row's end its last one again."""
    sizes = np.array(counts)
    steps = np.minimum(np.arange(sizes.max()), sizes[:, None] - 1)
    return (sizes.cumsum() - sizes)[:, None] + steps


def last_tokens(said: Sequence[Sequence[int]], back: int) -> Tensor:
    """The last ``back`` tokens that each request has generated, [R, back], -1 where there are fewer."""
    before = torch.full((len(said), back), -1)
    for row, tokens in enumerate(said):
        last = list(tokens[-back:])
        before[row, back - len(last) :] = torch.tensor(last, dtype=torch.int64)
    return before


def previous_tokens(before: Tensor, drafted: Tensor) -> Tensor:
    """The tokens generated 1 .. back places before each drafted one, [back, R, T]; -1 where there is none.

    Args:
        before: the last tokens that each request has generated, [R, back]. drafted: [R, T].
    """
    back, width = before.shape[1], drafted.shape[1]
    whole = torch.cat([before, drafted], dim=1)
    return torch.stack([whole[:, back - places : back - places + width] for places in range(1, back + 1)])
