"""Random numbers that are a function of a request's seed and of a place in its text, made where the logits are.

A counter and a mixing function in place of a stream, so that a row's numbers depend on nobody else and nothing is
copied. Mixing: SplitMix64 (Steele, Lea and Flood 2014), in int64, whose overflow wraps. M rows, T drafted positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Apart from the engine's own numbers, which are another function of the same seed and place.
SALT = 0x2545F4914F6CDD1D
NEXT_TOKEN = 1 << 40  # added to the place of a block: no text is that long
GOLDEN = 0x9E3779B97F4A7C15


def block_numbers(seeds: Tensor, places: Tensor) -> Tensor:
    """Numbers in [0, 1) for the checks of a block and for the token after it, [M, T+1] float64.

    Args:
        seeds: [M] int64. places: [M, T+1] int64, where each row of logits stands in its text; blocks of one text begin
            at different places.
    """
    last = places[:, :1] + NEXT_TOKEN
    counters = torch.cat([places[:, :-1], last], dim=1) * _signed(GOLDEN)
    bits = _mixed(_mixed(seeds, SALT).unsqueeze(1) + counters)
    return _shifted(bits, 11).double() * 2.0**-53


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
