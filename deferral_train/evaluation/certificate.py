"""A loss limit with a guarantee: Learn-then-Test over a fixed sequence of settings.

Settings are ordered before the losses are seen, from the safest to the boldest. Each is tested for H0:
E[loss] > limit with a p-value that is valid for every bounded distribution; testing stops at the first setting that
is not rejected, so the chance that any certified setting breaks the limit is at most delta (fixed-sequence
testing, Angelopoulos et al., "Learn then Test"). It bounds the mean over the population that the prompts
were drawn from, not over a test split.

The p-value is 1/E with E an e-value by betting (Waudby-Smith and Ramdas): for x in [0, 1] and H0: E[x] >= m,
prod_i (1 + b (m - x_i)) has mean at most 1 for each fixed b in [0, 1/(1-m)], and so has their average over
fixed bets. It adapts to the variance, which is what differences against lossless need (most are zero), and
it does not depend on the order of the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deferral_train.errors import InputError

# Shares of the largest admissible bet and their weights: bold bets pay when almost no prompt loses.
_SHARES = np.array([0.95, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03, 0.015, 0.007])
_WEIGHTS = np.array([0.3] + [0.7 / 11] * 11)


def betting_p_value(losses: np.ndarray, limit: float, low: float = 0.0, high: float = 1.0) -> float:
    """p-value of H0: E[loss] > ``limit`` for independent losses in [low, high].

    Args:
        losses: [n] per-prompt losses. limit: loss to be kept, in the same unit. low, high: bounds of one
            loss.

    Raises:
        InputError: where a loss lies outside its bounds, or the limit does.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.size and (values.min() < low - 1e-9 or values.max() > high + 1e-9 or np.isnan(values).any()):
        raise InputError(f"losses must lie in [{low}, {high}], got {values.min():.3g} to {values.max():.3g}")
    if limit >= high:
        return 0.0
    if limit <= low:
        return 1.0
    factors = _log_factors(np.clip(values, low, high), limit, low, high)
    return _p_value(factors.sum(axis=1))


def _log_factors(values: np.ndarray, limit: float, low: float, high: float) -> np.ndarray:
    """Log of what each bet multiplies its wealth by at each loss [n]: [bets, n]."""
    scaled, bar = (values - low) / (high - low), (limit - low) / (high - low)
    return np.log1p((_SHARES / (1 - bar))[:, None] * (bar - scaled)[None, :])


def _p_value(log_wealth: np.ndarray) -> float:
    """One over the weighted mean wealth of the bets, at most 1."""
    return float(min(1.0, np.exp(-np.logaddexp.reduce(log_wealth + np.log(_WEIGHTS)))))


def _p_value_of_zeros(prompts: int, limit: float, low: float, high: float) -> float:
    """The p-value where every prompt loses exactly 0."""
    if limit >= high:
        return 0.0
    return _p_value(prompts * _log_factors(np.zeros(1), limit, low, high)[:, 0]) if limit > low else 1.0


def smallest_certifiable(prompts: int, confidence: float, low: float = 0.0, high: float = 1.0) -> float:
    """Smallest limit that ``prompts`` prompts can certify, all of them losing exactly zero; ``high`` if
    none.
    """
    failing, passing = max(low, 0.0), high
    for _ in range(60):
        middle = (failing + passing) / 2
        if _p_value_of_zeros(prompts, middle, low, high) <= 1 - confidence:
            passing = middle
        else:
            failing = middle
    return passing


def prompts_needed(limit: float, confidence: float, low: float = 0.0, high: float = 1.0) -> int:
    """Fewest prompts, all losing zero, with which ``limit`` can be certified."""
    few, many = 0, 1
    while _p_value_of_zeros(many, limit, low, high) > 1 - confidence:
        few, many = many, 2 * many
        if many > 10**7:
            raise InputError(f"max_loss {limit:g} cannot be certified with any realistic number of prompts")
    while many - few > 1:
        middle = (few + many) // 2
        enough = _p_value_of_zeros(middle, limit, low, high) <= 1 - confidence
        few, many = (few, middle) if enough else (middle, many)
    return many


@dataclass(frozen=True)
class Certificate:
    """Outcome of the fixed sequence.

    Attributes:
        certified: number of leading settings whose mean loss is at most ``limit`` with ``confidence``,
            jointly.
        p_values: of the tested settings, the last being the first that failed (absent where all passed).
        means: mean loss of every setting.
    """

    limit: float
    confidence: float
    prompts: int
    certified: int
    p_values: tuple[float, ...]
    means: tuple[float, ...]
    smallest: float


def fixed_sequence(
    losses: np.ndarray, limit: float, confidence: float = 0.95, *, low: float = 0.0, high: float = 1.0
) -> Certificate:
    """Test settings in the given order and stop at the first failure.

    Args:
        losses: [S, n] per-prompt loss of each setting, safest first, all on the same n prompts.
        limit: mean loss to be kept. confidence: 1 - delta. low, high: bounds of one loss.
    """
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}; for example 0.95")
    p_values: list[float] = []
    for row in losses:
        p_values.append(betting_p_value(row, limit, low, high))
        if p_values[-1] > 1 - confidence:
            break
    certified = sum(value <= 1 - confidence for value in p_values)
    smallest = smallest_certifiable(losses.shape[1], confidence, low, high)
    means = tuple(float(value) for value in losses.mean(axis=1))
    return Certificate(limit, confidence, losses.shape[1], certified, tuple(p_values), means, smallest)
