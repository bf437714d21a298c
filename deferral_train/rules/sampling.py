"""Drawing a token from weights with a given uniform number: the inverse of the cumulative sum."""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.errors import InputError


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index per row, with probability proportional to its weight.

    Args:
        weights: [R, V], not negative, each row with a positive sum.
        uniform: [R] in [0, 1).

    Returns:
        [R] int64. An index of weight 0 is never drawn. Sums run in float64: over a large vocabulary a float32
        cumulative sum would lose the tail.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniform.to(total).unsqueeze(1) * total, torch.nextafter(total, -total))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def uniforms(
    rows: int, drafts: int, generator: torch.Generator | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The random numbers of one block: [B, T] for the checks and [B] for the next token, float64.

    Their count depends on the shape alone, never on what is accepted.
    """
    device = like.device if generator is None else generator.device
    numbers = torch.rand(rows, drafts + 1, dtype=torch.float64, device=device, generator=generator)
    numbers = numbers.to(like.device)
    return numbers[:, :drafts], numbers[:, drafts]


def given_numbers(numbers: Tensor, rows: int, drafts: int) -> tuple[Tensor, Tensor]:
    """The caller's own random numbers [B, T+1], split as `uniforms` gives them.

    Raises:
        InputError: another shape.
    """
    if tuple(numbers.shape) != (rows, drafts + 1):
        raise InputError(
            f"numbers has shape {list(numbers.shape)}; for this block it must be [{rows}, {drafts + 1}]"
        )
    return numbers[:, :drafts].double(), numbers[:, drafts].double()
