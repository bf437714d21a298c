"""Drawing a token from weights with a given uniform number: the inverse of the cumulative sum."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index per row, with probability proportional to its weight.

    Args:
        weights: [R, V], not negative, each row with a positive sum.
        uniform: [R] float64 in [0, 1).

    Returns:
        [R] int64. An index of weight 0 is never drawn. Sums run in float64: over a large vocabulary a float32
        cumulative sum would lose the tail.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # Below the total however it rounds: a float64 below 1 is at most 1 - 2^-53.
    threshold = cumulative[:, -1:] * uniform.unsqueeze(1)
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.squeeze(1).clamp_(max=weights.shape[-1] - 1)  # for weights that are NaN


def uniforms(
    rows: int, drafts: int, generator: torch.Generator | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The random numbers of one block: [B, T] for the checks and [B] for the next token, float64, on `like`'s device.

    Their count depends on the shape alone, never on what is accepted. They are made where the generator lives.
    """
    device = like.device if generator is None else generator.device
    numbers = torch.rand(rows, drafts + 1, dtype=torch.float64, device=device, generator=generator)
    if device != like.device:
        numbers = numbers.to(like.device)
    return numbers[:, :drafts], numbers[:, drafts]
