"""EWIF in closed form, as the sources have it: what `drafting.speed.expect` is compared with."""

from __future__ import annotations

from collections.abc import Sequence


def ewif_plain(acceptance: float, tokens: int, cost: float) -> float:
    """(1 - a^(k+1)) / ((1 - a) (1 + k c)): one drafter writes k tokens."""
    return _powers(acceptance, tokens + 1) / (1 + tokens * cost)


def ewif_vertical(outer: float, inner: float, runs: int, tokens: int, costs: tuple[float, float]) -> float:
    """(1 - a phi(a)^n) / ((1 - a) (1 + n c1 + n k c2)): n reviews by drafter 1 of k tokens of drafter 2 each.

    phi(x) = 1 + (x - 1) (1 - (b x)^(k+1)) / (1 - b x) is the generating function of the tokens per review.

    Args:
        outer: a, acceptance of drafter 1 by the verifier.
        inner: b, acceptance of drafter 2 by drafter 1.
        runs, tokens: n and k.
        costs: c1, c2.
    """
    phi = 1 + (outer - 1) * _powers(inner * outer, tokens + 1)
    # (1 - a phi^n) / (1 - a) = 1 + a (1 - phi^n) / (1 - a), and (1 - phi) / (1 - a) stays finite at a = 1.
    gained = outer * _powers(inner * outer, tokens + 1) * _powers(phi, runs)
    return (1 + gained) / (1 + runs * costs[0] + runs * tokens * costs[1])


def ewif_horizontal(acceptances: Sequence[float], costs: Sequence[float]) -> float:
    """sum_{i=0..k} prod_{j<=i} a_j / (1 + sum_i c_i): place i is drafted by its own drafter."""
    reach, expected = 1.0, 1.0
    for acceptance in acceptances:
        reach *= acceptance
        expected += reach
    return expected / (1 + sum(costs))


def _powers(base: float, count: int) -> float:
    """1 + base + .. + base^(count-1)."""
    return sum(base**power for power in range(count))
