"""Random numbers that are a function of a request's seed and of a place in its text, made where the logits are.

A counter and a mixing function in place of a stream, so that a row's numbers depend on nobody else and nothing is
copied. Mixing: SplitMix64 (Steele, Lea and Flood 2014), in int64, whose overflow wraps. M rows, T drafted positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Apart from each other and from the engine's own numbers, which are other functions of the same seed and place.
CHECKS, NEXT_TOKEN = 0x2545F4914F6CDD1D, 0x6A09E667F3BCC909
GOLDEN = 0x9E3779B97F4A7C15


def block_numbers(seeds: Tensor, places: Tensor) -> Tensor:
    """Numbers in [0, 1) for the checks of a block and for the token after it, [M, T+1] float64.

    Args:
        seeds: [M] int64. places: [M, T+1] int64, where each row of logits stands in its text; blocks of one text begin
            at different places.
    """
    checks = _mixed(_mixed(seeds.unsqueeze(1), CHECKS) + places[:, :-1] * _signed(GOLDEN))
    last = _mixed(_mixed(seeds, NEXT_TOKEN) + places[:, 0] * _signed(GOLDEN))
    return _unit(torch.cat([checks, last.unsqueeze(1)], dim=1))


def _mixed(value: Tensor, salt: int = GOLDEN) -> Tensor:
    value = value + _signed(salt)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shifted right as an unsigned number."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _unit(bits: Tensor) -> Tensor:
    return _shifted(bits, 11).double() * 2.0**-53
