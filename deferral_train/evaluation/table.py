"""The table that `score_rules` returns: numbers with intervals, curves, matched comparisons; json and csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import Interval, PromptBootstrap
from deferral_train.evaluation.curves import SHARES, Curve, area_difference, differences
from deferral_train.rules.registry import short_label

SCHEMA = 1
# Axes of the curves: costs on x, losses on y; all are ratios of sums over prompts.
COSTS = ("rejection_rate", "calls_per_token", "relative_latency")
LOSSES = ("risk", "emitted_risk")


@dataclass(frozen=True)
class RuleScores:
    """One rule over its dial.

    Attributes:
        name: as shown.
        rule: the rule's own name.
        parameter: of its dial, None without one.
        values: dial values [S].
        chosen: the one of them that the caller spelled out, or None.
        metrics: name to estimates [S].
        redrawn: name to bootstrap redraws [S, B].
        agreement: with OPT and the exact rule at matched rejection rate: name to share of positions [S].
        per_prompt: sums over each prompt's positions [S, P], by the names of :data:`scan.SUMS`.
    """

    name: str
    rule: str
    parameter: str | None
    values: tuple[float | None, ...]
    chosen: float | None
    metrics: dict[str, np.ndarray]
    redrawn: dict[str, np.ndarray]
    agreement: dict[str, np.ndarray] = field(default_factory=dict)
    per_prompt: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of several rules on the same prompts.

    Attributes:
        meta: loss, truth, temperature, prefixes, counts, assumptions.
        rules: by name, in the order they were asked for; `drafter_only`, `lossless` and `opt` are always
            there.
        bootstrap: the redraws that all intervals share.
        rows_per_prompt: positions of each prompt, [P].
        calibration: per estimator of the gap, predicted against observed.
        prefixes: tokens of some prompts for the report's alpha slider, None where none were asked for.
    """

    meta: dict[str, Any]
    rules: dict[str, RuleScores]
    bootstrap: PromptBootstrap
    rows_per_prompt: np.ndarray
    calibration: dict[str, Any] = field(default_factory=dict)
    prefixes: dict[str, Any] | None = None
    _curves: dict[tuple[str, str, str], Curve] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> RuleScores:
        try:
            return self.rules[name]
        except KeyError:
            raise InputError(f"no scores of {name!r}; the table holds {', '.join(self.rules)}") from None

    @property
    def swept(self) -> list[str]:
        """Rules that trade something: those with more than one setting."""
        return [name for name, scores in self.rules.items() if len(scores.values) > 1]

    def interval(self, name: str, metric: str, setting: int) -> Interval:
        """One number of the table with its interval."""
        scores = self[name]
        redrawn = scores.redrawn[metric][setting] if metric in scores.redrawn else np.zeros(0)
        if not len(redrawn):
            return Interval(float(scores.metrics[metric][setting]))
        return self.bootstrap.interval(float(scores.metrics[metric][setting]), redrawn)

    def curve(self, name: str, loss: str = "risk", cost: str = "rejection_rate") -> Curve:
        """A rule's curve between the drafter's end and the lossless end, see :mod:`curves`."""
        key = (name, loss, cost)
        if key not in self._curves:
            self._curves[key] = self._make_curve(name, loss, cost)
        return self._curves[key]

    def _make_curve(self, name: str, loss: str, cost: str) -> Curve:
        for metric in (loss, cost):
            if metric not in self[name].metrics:
                known = ", ".join(self[name].metrics)
                raise InputError(f"{name} has no {metric} in this table; it has {known}")
        ordered = [self["drafter_only"], self[name], self["lossless"]]
        x, y = (np.concatenate([scores.metrics[metric] for scores in ordered]) for metric in (cost, loss))
        x_redrawn, y_redrawn = (
            np.concatenate([scores.redrawn[metric] for scores in ordered]) for metric in (cost, loss)
        )
        return Curve(name, x, y, x_redrawn, y_redrawn)

    def matched(self, baseline: str = "opt", shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
        """Every rule's loss at matched cost and its paired difference to ``baseline``; one row per number."""
        return [row for name in self.swept for row in self._matched_rows(name, baseline, shares)]

    def _matched_rows(self, name: str, baseline: str, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
        for loss in LOSSES:
            for cost in COSTS:
                if not {loss, cost} <= set(self[name].metrics):
                    continue
                curve, base = self.curve(name, loss, cost), None
                if {loss, cost} <= set(self[baseline].metrics):
                    base = self.curve(baseline, loss, cost)
                yield from self._rows_of(curve, base, loss, cost, shares)

    def _rows_of(
        self, curve: Curve, base: Curve | None, loss: str, cost: str, shares: Sequence[float]
    ) -> Iterator[dict[str, Any]]:
        values, redrawn = curve.at(shares)
        area, area_redrawn = curve.area()
        gaps = differences(curve, base, self.bootstrap, shares) if base else [None] * len(shares)
        head = {"rule": curve.name, "loss": loss, "cost": cost}
        for share, value, samples, gap in zip(shares, values, redrawn, gaps):
            interval = self.bootstrap.interval(value, samples)
            yield {**head, "share": share, **interval.as_dict(), "minus_baseline": gap and gap.as_dict()}
        gap = area_difference(curve, base, self.bootstrap) if base else None
        interval = self.bootstrap.interval(area, area_redrawn)
        yield {**head, "share": "area", **interval.as_dict(), "minus_baseline": gap and gap.as_dict()}

    def points(self) -> list[dict[str, Any]]:
        """One row per rule and setting, each metric as value, low, high."""
        return [
            {
                "rule": name,
                "parameter": scores.parameter,
                "value": value,
                "chosen": value is not None and value == scores.chosen,
                **{metric: self.interval(name, metric, i).as_dict() for metric in scores.metrics},
                **{metric: float(share[i]) for metric, share in scores.agreement.items()},
            }
            for name, scores in self.rules.items()
            for i, value in enumerate(scores.values)
        ]

    def as_dict(self, baseline: str = "opt") -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "schema": SCHEMA,
            "meta": {**self.meta, "baseline": baseline},
            "points": self.points(),
            "matched": self.matched(baseline),
            "calibration": self.calibration,
        }

    def to_json(self, path: str | Path, baseline: str = "opt") -> Path:
        """Write :meth:`as_dict` atomically."""
        provenance.write_json(path, self.as_dict(baseline))
        return Path(path)

    def to_csv(self, path: str | Path) -> Path:
        """Write :meth:`points` as one flat table; an interval becomes three columns."""
        import pandas

        table = pandas.DataFrame([dict(_columns(row)) for row in self.points()])
        provenance.write_text(path, table.to_csv(index=False, lineterminator="\n"))
        return Path(path)

    def text(self, baseline: str = "opt", shares: Sequence[float] = (0.25, 0.5, 0.75)) -> str:
        """A short table for the terminal: loss at matched rejection rate and its difference to
        ``baseline``.
        """
        loss = "emitted_risk" if "emitted_risk" in self["lossless"].metrics else "risk"
        rows = [row for row in self.matched(baseline, shares) if row["cost"] == "rejection_rate"]
        whole = self["lossless"].metrics["rejection_rate"][0]
        lines = [f"{loss} at a share of lossless's rejections ({whole:.3f})"]
        lines.append(f"{'rule':<32}" + "".join(f"{share:>26.0%}" for share in shares))
        for name in self.swept:
            cells = [
                row for row in rows if row["rule"] == name and row["loss"] == loss and row["share"] != "area"
            ]
            if cells:
                lines.append(f"{short_label(name, 31):<32}" + "".join(f"{_cell(cell):>26}" for cell in cells))
        if unbounded := self.meta.get("unbounded"):
            lines.append(
                f"no bound on what unlogged tokens change: {', '.join(unbounded)}; check with decode"
            )
        return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    """``0.512 (-0.010, -0.014..-0.005)``: value, and the difference to the baseline with its interval."""
    gap = row["minus_baseline"]
    if gap is None or gap["low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ({gap['low']:+.3f}..{gap['high']:+.3f})"


def _columns(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from (
                (name, value["value"]),
                (f"{name}_low", value["low"]),
                (f"{name}_high", value["high"]),
            )
        else:
            yield name, value
