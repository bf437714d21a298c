"""Regret and its companions as torchmetrics: thin states around pure functions (rules.risks and this file).

N rows, A alphas, P position buckets. Sums are float64 and counts int64, reduced by addition across
processes, so that any split of the rows over batches and ranks gives one and the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from deferral_train.errors import InputError
from deferral_train.rules import risks

BUCKETS = (0, 4, 8, 16)  # first position of each bucket; the last is open
MAX_ALPHA = 10.0


def check_alphas(alphas: Sequence[float]) -> list[float]:
    """A grid of distinct finite alphas in [-10, 10], ascending; anything else is refused."""
    grid = [float(a) for a in alphas]
    if not grid or any(not abs(a) <= MAX_ALPHA for a in grid):
        raise InputError(f"alpha grid {grid[:20]} is out of range; give at least one value in [-10, 10]")
    if sorted(set(grid)) != grid:
        raise InputError(f"alpha grid {grid[:20]} must be ascending without repeats")
    return grid


def defer_at(gap: Tensor, tv: Tensor, alphas: Tensor) -> Tensor:
    """1[gap > alpha tv] for every alpha, ``[N, A]``; False for a gap of NaN, which the caller counts."""
    return gap.unsqueeze(-1) > alphas.to(gap) * tv.unsqueeze(-1)


def excess_risk(z: Tensor, tv: Tensor, defer: Tensor, baseline: Tensor, alphas: Tensor) -> Tensor:
    """L_spec(defer) - L_spec(baseline) ``[N, A]``, unbiased if z is: (r_h - r_b)(alpha tv - z)."""
    price = alphas.to(torch.float64) * tv.double().unsqueeze(-1) - z.double().unsqueeze(-1)
    return (defer.double() - baseline.double()) * price


def bucket_of(position: Tensor, starts: Sequence[int] = BUCKETS) -> Tensor:
    """Index of the position bucket of each row, ``[N]`` int64."""
    edges = torch.tensor(starts[1:], device=position.device, dtype=position.dtype)
    return torch.bucketize(position, edges, right=True)


class PerAlpha(Metric):
    """Mean over rows of a quantity ``[N, A]``, kept per alpha and position bucket; compute() is the grand
    mean.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor
    alphas: Tensor

    def __init__(self, alphas: Sequence[float], buckets: Sequence[int] = BUCKETS, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.buckets = tuple(buckets)
        self.register_buffer(
            "alphas", torch.tensor(check_alphas(alphas), dtype=torch.float64), persistent=False
        )
        shape = (len(self.buckets), len(alphas))
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape[0], dtype=torch.int64), dist_reduce_fx="sum")

    def tally(self, values: Tensor, position: Tensor) -> None:
        """Add values ``[N, A]`` of rows at ``position [N]``."""
        bucket = bucket_of(position, self.buckets)
        self.total.index_add_(0, bucket, values.double())
        self.count.index_add_(0, bucket, torch.ones_like(bucket))

    def compute(self) -> Tensor:
        return self.per_alpha().mean()

    def per_alpha(self) -> Tensor:
        """Mean over rows, ``[A]``; call after compute() has synchronised, or on one process."""
        return self.total.sum(0) / self.count.sum()

    def per_bucket(self) -> Tensor:
        """Mean over rows and alphas in each position bucket, ``[P]``; NaN where a bucket is empty."""
        return self.total.mean(1) / self.count


class Regret(PerAlpha):
    """Exact regret |gap - alpha tv| 1[r != r*] where the true gap is known (equation 9)."""

    def update(self, gap: Tensor, tv: Tensor, defer: Tensor, position: Tensor) -> None:
        price = self.alphas * tv.double().unsqueeze(-1)
        self.tally(risks.regret(gap.double().unsqueeze(-1), price, defer, 1.0), position)


class HindsightExcess(Regret):
    """Excess over the best decision in hindsight of each gold token. Biased as an oracle; never called
    regret.
    """


class ExcessRisk(PerAlpha):
    """Estimated L_spec of a head minus that of a fixed rule on the same tokens: unbiased, may be negative."""

    def update(self, z: Tensor, tv: Tensor, defer: Tensor, baseline: Tensor, position: Tensor) -> None:
        self.tally(excess_risk(z, tv, defer, baseline, self.alphas), position)


class Disagreement(PerAlpha):
    """Share of positions at which a head and a rule decide differently."""

    def update(self, defer: Tensor, baseline: Tensor, position: Tensor) -> None:
        self.tally((defer != baseline).double(), position)


class RejectionRate(PerAlpha):
    """Mean r tv: the probability that a drafted token is rejected (Lemma 3)."""

    def update(self, tv: Tensor, defer: Tensor, position: Tensor) -> None:
        self.tally(defer.double() * tv.double().unsqueeze(-1), position)


class RelativeRisk(PerAlpha):
    """Mean -r z: deferral risk relative to never deferring, in units of the loss."""

    def update(self, z: Tensor, defer: Tensor, position: Tensor) -> None:
        self.tally(-defer.double() * z.double().unsqueeze(-1), position)


def calibration(sums: Tensor, count: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Expected calibration error sum_b |sum prediction - sum label| / N, and mean square error, from bin
    sums.
    """
    total = count.sum()
    return (sums[:, 0] - sums[:, 1]).abs().sum() / total, square / total


def auroc(counts: Tensor) -> Tensor:
    """P(score of a positive > score of a negative) + half the ties, from histograms ``[2, bins]``; else
    NaN.
    """
    negative, positive = counts[0].double(), counts[1].double()
    below = negative.cumsum(0) - negative / 2
    pairs = negative.sum() * positive.sum()
    return (positive * below).sum() / pairs if pairs > 0 else torch.full_like(pairs, torch.nan)


class Calibration(Metric):
    """Reliability of a prediction against an unbiased label, in equal bins: ECE and Brier score (mean
    square).

    The label need be neither binary nor inside the bins' range; for a gap it is z in [-1, 1].
    """

    full_state_update = False
    higher_is_better = False
    sums: Tensor
    count: Tensor
    square: Tensor

    def __init__(self, low: float = -1.0, high: float = 1.0, bins: int = 20, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.low, self.high, self.bins = low, high, bins
        self.add_state("sums", torch.zeros(bins, 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("square", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        prediction, label = prediction.double(), label.double()
        place = (prediction - self.low) / (self.high - self.low) * self.bins
        bucket = place.nan_to_num(0).clamp(0, self.bins - 1).long()
        self.sums.index_add_(0, bucket, torch.stack([prediction, label], dim=-1))
        self.count.index_add_(0, bucket, torch.ones_like(bucket))
        self.square += ((prediction - label) ** 2).sum()

    def compute(self) -> dict[str, Tensor]:
        ece, brier = calibration(self.sums, self.count, self.square)
        return {"ece": ece, "brier": brier}

    def reliability(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean prediction, mean label and count of the non-empty bins."""
        full = self.count > 0
        means = self.sums[full] / self.count[full].unsqueeze(-1)
        return means[:, 0], means[:, 1], self.count[full]


class Count(Metric):
    """Number of rows that are marked."""

    full_state_update = False
    higher_is_better = False
    count: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, marked: Tensor) -> None:
        self.count += marked.sum()

    def compute(self) -> Tensor:
        return self.count


class WeightedMean(Metric):
    """Mean of values under weights; NaN without any weight."""

    full_state_update = False
    higher_is_better = False
    sums: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        self.sums += torch.stack([(values * weights).double().sum(), weights.double().sum()])

    def compute(self) -> Tensor:
        return self.sums[0] / self.sums[1]


class BinnedAUROC(Metric):
    """Area under the ROC curve of a score in [low, high] from histograms; ties within a bin count one half.

    With equal scores in a bin only, it is exact; otherwise its error is at most half the mass of shared bins.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, low: float = -1.0, high: float = 1.0, bins: int = 2000, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.low, self.high, self.bins = low, high, bins
        self.add_state("counts", torch.zeros(2, bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, score: Tensor, positive: Tensor) -> None:
        place = (score.double() - self.low) / (self.high - self.low) * self.bins
        bucket = place.nan_to_num(0).clamp(0, self.bins - 1).long()
        flat = positive.long() * self.bins + bucket
        self.counts += torch.bincount(flat, minlength=2 * self.bins).view(2, self.bins)

    def compute(self) -> Tensor:
        return auroc(self.counts)
