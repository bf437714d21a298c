"""Quality against speed of decoded rules: the paper's Table 2 and Figures 1, 3, 4 and 5 for any pair.

A rule's decoded settings are joined by straight lines, like offline curves (:mod:`curves`): between two
settings a random choice per prompt attains the line. Latency is relative to the verifier alone.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.evaluation.settings import dials_of, setting_of

VERIFIER = "verifier_only"
# Cost on the x axis of each figure: key of a rule's summary, and its label.
COSTS = {
    "deferral_rate": "deferrals per drafted token (Figure 1)",
    "rejection_rate": "rejection rate (Figure 3)",
    "latency": "latency relative to the verifier alone (Figures 4 and 5)",
}


@dataclass(frozen=True)
class Point:
    """One decoded setting: quality, latency relative to the verifier alone, deferral and rejection rate."""

    label: str
    quality: float
    latency: float
    deferral_rate: float
    rejection_rate: float


def decoded_points(summary: Mapping[str, Any], metric: str = "bleu") -> dict[str, list[Point]]:
    """Settings by rule, in order of latency, from ``decode``'s summary; rules without a dial have one point.

    Raises:
        InputError: the verifier alone was not decoded, or the metric is not in the summary.
    """
    rules = summary["rules"]
    if VERIFIER not in rules:
        raise InputError(f"summary has no {VERIFIER}; decode it beside the others, latency is relative to it")
    if metric not in rules[VERIFIER]["quality"]:
        known = ", ".join(
            key for key in rules[VERIFIER]["quality"] if key not in ("signatures", "references")
        )
        raise InputError(
            f"metric {metric!r} is not in the summary; it holds {known or 'none: no references'}"
        )
    alone = rules[VERIFIER]["ms_per_token"]
    dials = dials_of(summary)
    found: dict[str, list[Point]] = defaultdict(list)
    for label, rule in rules.items():
        setting = setting_of(label, dials)
        found[label if setting is None else setting.family].append(
            Point(
                label,
                rule["quality"][metric],
                rule["ms_per_token"] / alone,
                rule.get("deferral_rate") or 0.0,
                rule.get("rejection_rate") or 0.0,
            )
        )
    return {name: sorted(points, key=lambda point: point.latency) for name, points in found.items()}


def table2(points: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """Per rule: speed-up at the verifier's quality, and best quality without exceeding the verifier's
    latency.

    ``speedup_at_quality`` is None where no setting (and no mixture of two neighbours) reaches the verifier's
    quality. The choice of setting is made on the reported outputs, as in the paper; it is optimistic for
    rules with many settings.
    """
    goal = points[VERIFIER][0].quality
    rows = []
    for name, line in points.items():
        if name == VERIFIER:
            continue
        latency = least_latency(line, goal)
        rows.append(
            {
                "rule": name,
                "settings": len(line),
                "speedup_at_quality": None if latency is None else 1 / latency,
                "best_quality_within_latency": best_quality(line, 1.0),
            }
        )
    return rows


def least_latency(line: Sequence[Point], quality: float) -> float | None:
    """Smallest latency on the line through ``line`` with at least ``quality``; None where it is not
    reached.
    """
    reached = [point.latency for point in line if point.quality >= quality]
    for first, second in itertools.pairwise(line):
        low, high = sorted((first, second), key=lambda point: point.quality)
        if low.quality < quality <= high.quality:
            share = (quality - low.quality) / (high.quality - low.quality)
            reached.append(low.latency + share * (high.latency - low.latency))
    return min(reached, default=None)


def best_quality(line: Sequence[Point], latency: float) -> float | None:
    """Best quality on the line with at most ``latency``; None where every setting is slower."""
    found = [point.quality for point in line if point.latency <= latency]
    for first, second in itertools.pairwise(line):
        if first.latency <= latency < second.latency:
            share = (latency - first.latency) / (second.latency - first.latency)
            found.append(first.quality + share * (second.quality - first.quality))
    return max(found, default=None)


def draw_figures(points: Mapping[str, Sequence[Point]], folder: Path, metric: str) -> list[Path]:
    """Quality against each of :data:`COSTS`, as png and svg; returns the files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for cost, label in COSTS.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, line in points.items():
            ordered = sorted(line, key=lambda point: getattr(point, cost))
            axes.plot(
                [getattr(p, cost) for p in ordered],
                [p.quality for p in ordered],
                marker="o",
                ms=4,
                label=name,
            )
        axes.axhline(points[VERIFIER][0].quality, color="gray", linestyle=":", linewidth=1)
        axes.set(xlabel=label, ylabel=metric)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        for suffix in ("png", "svg"):
            path = folder / f"{metric}_against_{cost}.{suffix}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
    return written
