"""Bootstrap over prompts: tokens of one prompt are dependent, so a prompt is the unit that is redrawn.

One weight matrix serves every statistic, so quantities of two rules on the same prompts are resampled
together and their difference has a paired interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from deferral_train.errors import InputError

MIN_PROMPTS = 10
_BLOCK = 256


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile interval; ``low`` and ``high`` are None where no bootstrap was asked
    for.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class PromptBootstrap:
    """Multinomial bootstrap weights over ``prompts`` prompts, the same for everything that is resampled.

    Args:
        prompts: number of prompts P.
        replicates: number of redraws B; 0 switches intervals off.
        seed: of the redraws.
        confidence: of the percentile intervals.

    Raises:
        InputError: with fewer than ``MIN_PROMPTS`` prompts, whose percentile intervals mean nothing.
    """

    prompts: int
    replicates: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.replicates and self.prompts < MIN_PROMPTS:
            raise InputError(
                f"bootstrap needs at least {MIN_PROMPTS} prompts, these traces hold {self.prompts}: "
                "give more prompts, or bootstrap=0 for numbers without intervals"
            )
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence must lie between 0 and 1, got {self.confidence}; for example 0.95")

    @cached_property
    def weights(self) -> np.ndarray:
        """How often each prompt is drawn, float32 [B, P]; rows sum to P."""
        generator = np.random.default_rng(self.seed)
        weights = np.empty((self.replicates, self.prompts), dtype=np.float32)
        for start in range(0, self.replicates, _BLOCK):
            count = min(_BLOCK, self.replicates - start)
            drawn = generator.integers(0, self.prompts, size=(count, self.prompts))
            drawn += np.arange(count)[:, None] * self.prompts
            table = np.bincount(drawn.ravel(), minlength=count * self.prompts)
            weights[start : start + count] = table.reshape(count, self.prompts)
        return weights

    def sums(self, per_prompt: np.ndarray) -> np.ndarray:
        """Redrawn sums of per-prompt sums: [.., P] -> [.., B], float64.

        The mean is taken out before the float32 product, so that rounding is relative to the spread.
        """
        values = np.asarray(per_prompt, dtype=np.float64)
        centre = values.mean(axis=-1, keepdims=True)
        spread = (values - centre).astype(np.float32) @ self.weights.T
        return spread.astype(np.float64) + centre * self.prompts

    def percentiles(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two-sided percentile limits over the last axis: [.., B] -> ([..], [..])."""
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(samples, [tail, 1 - tail], axis=-1)
        return low, high

    def interval(self, value: float, samples: np.ndarray) -> Interval:
        """``value`` with the percentile limits of its redraws [B]."""
        if not self.replicates:
            return Interval(float(value))
        low, high = self.percentiles(samples)
        return Interval(float(value), float(low), float(high))

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval:
        """Interval of sum(numerator) / sum(denominator) over prompts, both [P] and redrawn together."""
        value = float(np.sum(numerator, dtype=np.float64) / np.sum(denominator, dtype=np.float64))
        if not self.replicates:
            return Interval(value)
        return self.interval(value, self.sums(numerator) / self.sums(denominator))

    def mean(self, values: np.ndarray) -> Interval:
        """Interval of the mean over prompts of ``values`` [P]."""
        return self.ratio(values, np.ones(self.prompts))


@dataclass(frozen=True)
class Redraws:
    """How numbers of any prompts get their intervals; below ``MIN_PROMPTS`` prompts there are no limits.

    Attributes:
        replicates: redraws B, 0 for no intervals.
        seed: of the redraws.
        confidence: of the intervals.
    """

    replicates: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def over(self, prompts: int) -> PromptBootstrap:
        """The bootstrap over so many prompts, without replicates where they are too few."""
        replicates = self.replicates if prompts >= MIN_PROMPTS else 0
        return _bootstrap(prompts, replicates, self.seed, self.confidence)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval | None:
        """sum(numerator) / sum(denominator) over the prompts [P] where the denominator is not 0; None without any."""
        own = denominator > 0
        if not own.any():
            return None
        return self.over(int(own.sum())).ratio(numerator[own], denominator[own])


@lru_cache(maxsize=16)
def _bootstrap(prompts: int, replicates: int, seed: int, confidence: float) -> PromptBootstrap:
    return PromptBootstrap(prompts, replicates, seed, confidence)
