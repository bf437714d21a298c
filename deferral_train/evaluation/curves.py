"""Curves of one quantity against a cost: values at matched cost, areas, paired differences between rules.

Every curve starts at the drafter (never defer) and ends at lossless execution (always defer): all rules
share these two settings. Costs are expressed as the **share** of the way between the two, so 0.5 on the
rejection axis means half the rejections of lossless decoding, in each bootstrap redraw by its own ends.

A rule's dial points are joined by straight lines. Between two neighbouring settings a line is attainable:
choose one of the two at random for each token, and rejections and risk mix linearly on the same prefixes. No
hull is taken, because picking the better of many points on the data they are reported on would flatter a
rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from deferral_train.evaluation.bootstrap import Interval, PromptBootstrap

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
_AREA_GRID = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Curve:
    """One rule's points, the drafter's end first and the lossless end last.

    Attributes:
        name: of the rule.
        x, y: [S] cost and quantity at each setting.
        x_redrawn, y_redrawn: [S, B] the same under each redraw of prompts; B = 0 without a bootstrap.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    x_redrawn: np.ndarray
    y_redrawn: np.ndarray

    _known: dict[bytes, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def at(self, shares: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value at each share of the cost range, [M] and redrawn [M, B]; computed once for the same shares."""
        wanted = np.asarray(shares, dtype=np.float64)
        key = wanted.tobytes()
        if key not in self._known:
            redrawn = [at_share(x, y, wanted) for x, y in zip(self.x_redrawn.T, self.y_redrawn.T)]
            values = at_share(self.x, self.y, wanted)
            self._known[key] = values, np.reshape(redrawn, (-1, len(wanted))).T
        return self._known[key]

    def area(self) -> tuple[float, np.ndarray]:
        """Mean value over the whole cost range (area under the curve over shares 0 to 1), and its redraws
        [B].
        """
        values, redrawn = self.at(_AREA_GRID)
        weights = np.full(len(_AREA_GRID), 1.0)
        weights[[0, -1]] = 0.5
        weights /= weights.sum()
        return float(weights @ values), weights @ redrawn


def at_share(x: np.ndarray, y: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Piecewise linear y where x has gone ``shares`` [M] of the way from x[0] to x[-1].

    Points are taken in order of x; where several share one x, their mean stands for them. A range of zero
    length (the two models agree everywhere) gives the mean of y.
    """
    span = x[-1] - x[0]
    if span == 0:
        return np.full(len(shares), y.mean())
    order = np.argsort(x, kind="stable")
    sorted_x, sorted_y = x[order], y[order]
    new = np.r_[True, np.diff(sorted_x) > 0]
    first = np.flatnonzero(new)
    means = np.add.reduceat(sorted_y, first) / np.diff(np.r_[first, len(x)])
    return np.interp(x[0] + shares * span, sorted_x[first], means)


def differences(
    curve: Curve, baseline: Curve, bootstrap: PromptBootstrap, shares: Sequence[float] = SHARES
) -> list[Interval]:
    """``curve`` minus ``baseline`` at each matched share, with paired intervals."""
    value, redrawn = curve.at(shares)
    base, base_redrawn = baseline.at(shares)
    gaps = redrawn - base_redrawn
    return [bootstrap.interval(value[i] - base[i], gaps[i]) for i in range(len(value))]


def area_difference(curve: Curve, baseline: Curve, bootstrap: PromptBootstrap) -> Interval:
    """Mean of ``curve`` minus ``baseline`` over all shares, with a paired interval."""
    value, redrawn = curve.area()
    base, base_redrawn = baseline.area()
    return bootstrap.interval(value - base, redrawn - base_redrawn)
