"""Quality against speed of decoded rules: the paper's Table 2 and Figures 1, 3, 4 and 5 for any pair.

A rule's decoded settings are joined by straight lines, like offline curves (:mod:`curves`): between two
settings a random choice per prompt attains the line. Latency is wall clock of the same prompts relative to the
verifier alone, so that a rule that writes longer texts pays for it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.evaluation.online import speed_table
from deferral_train.evaluation.settings import dials_of, setting_of
from deferral_train.redaction import redacted_text

VERIFIER = "verifier_only"
# Cost on the x axis of each figure: field of a point, and its label.
COSTS = {
    "deferral_rate": "deferrals per drafted token (Figure 1)",
    "rejection_rate": "rejection rate (Figure 3)",
    "latency": "time relative to the verifier alone (Figures 4, 5)",
    "calls_per_token": "verifier calls per token",
}


@dataclass(frozen=True)
class FrontierPoint:
    """One decoded setting: quality, latency relative to the verifier alone with its limits over batches (None
    where there are too few), deferral and rejection rate, verifier calls per emitted token (0 for the drafter
    alone), mean output length in tokens.
    """

    label: str
    quality: float
    latency: float
    deferral_rate: float
    rejection_rate: float
    calls_per_token: float = 0.0
    latency_low: float | None = None
    latency_high: float | None = None
    mean_output_tokens: float | None = None


def decoded_points(
    summary: Mapping[str, Any], metric: str = "bleu", batches: Sequence[Mapping[str, Any]] = ()
) -> dict[str, list[FrontierPoint]]:
    """Settings by rule, in order of latency, from ``decode``'s summary; rules without a dial have one point.

    Args:
        summary: ``summary.json``.
        metric: of its ``quality``.
        batches: of ``batches.jsonl``, for intervals of the latency over batches.

    Raises:
        InputError: the verifier alone was not decoded, or the metric is not in the summary.
    """
    rules, metric = summary["rules"], redacted_text(metric)
    if VERIFIER not in rules:
        raise InputError(f"summary has no {VERIFIER}; decode it beside the others, latency is relative to it")
    if metric not in rules[VERIFIER]["quality"]:
        known = ", ".join(
            key for key in rules[VERIFIER]["quality"] if key not in ("signatures", "references")
        )
        raise InputError(
            f"metric {metric!r} is not in the summary; it holds {known or 'none: no references'}"
        )
    alone = rules[VERIFIER]["seconds"]
    speeds = speed_table(batches)
    dials = dials_of(summary)
    found: dict[str, list[FrontierPoint]] = defaultdict(list)
    for label, rule in rules.items():
        setting = setting_of(label, dials)
        speed = speeds.get(label)
        found[label if setting is None else setting.family].append(
            FrontierPoint(
                label,
                rule["quality"][metric],
                rule["seconds"] / alone if speed is None else 1 / speed.value,
                1.0 if label == VERIFIER else rule.get("deferral_rate") or 0.0,
                rule.get("rejection_rate") or 0.0,
                rule.get("verifier_calls_per_token") or 0.0,
                1 / speed.high if speed and speed.high else None,
                1 / speed.low if speed and speed.low else None,
                rule.get("mean_output_tokens"),
            )
        )
    return {name: sorted(points, key=lambda point: point.latency) for name, points in found.items()}


def table2(points: Mapping[str, Sequence[FrontierPoint]]) -> list[dict[str, Any]]:
    """Per rule: speed-up at the verifier's quality, and best quality without exceeding the verifier's
    latency.

    ``speedup_at_quality`` is None where no setting (and no mixture of two neighbours) reaches the verifier's
    quality; ``calls_at_quality`` is the same with verifier calls per token for latency, which depends on no
    machine. The choice of setting is made on the reported outputs, as in the paper; it is optimistic for
    rules with many settings.
    """
    goal = points[VERIFIER][0].quality
    rows = []
    for name, line in points.items():
        if name == VERIFIER:
            continue
        latency, calls = (least_cost(line, goal, cost) for cost in ("latency", "calls_per_token"))
        rows.append(
            {
                "rule": name,
                "settings": len(line),
                "speedup_at_quality": None if latency is None else 1 / latency,
                "calls_at_quality": calls,
                "best_quality_within_latency": best_quality(line, 1.0),
            }
        )
    return rows


def least_cost(line: Sequence[FrontierPoint], quality: float, cost: str = "latency") -> float | None:
    """Smallest cost on the line through ``line``, taken in order of that cost, with at least ``quality``; None
    where it is not reached.
    """
    ordered = sorted(line, key=lambda point: getattr(point, cost))
    reached = [getattr(point, cost) for point in ordered if point.quality >= quality]
    for pair in itertools.pairwise(ordered):
        low, high = sorted(pair, key=lambda point: point.quality)
        if low.quality < quality <= high.quality:
            share = (quality - low.quality) / (high.quality - low.quality)
            ends = getattr(low, cost), getattr(high, cost)
            reached.append(ends[0] + share * (ends[1] - ends[0]))
    return min(reached, default=None)


def best_quality(line: Sequence[FrontierPoint], latency: float) -> float | None:
    """Best quality on the line with at most ``latency``; None where every setting is slower."""
    found = [point.quality for point in line if point.latency <= latency]
    for first, second in itertools.pairwise(line):
        if first.latency <= latency < second.latency:
            share = (latency - first.latency) / (second.latency - first.latency)
            found.append(first.quality + share * (second.quality - first.quality))
    return max(found, default=None)


def frontier_of(
    summary: Mapping[str, Any], metric: str, batches: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """One temperature's entry of ``frontier.json``: points by rule and Table 2, with n and settings."""
    points = decoded_points(summary, metric, batches)
    settings = summary.get("settings", {})
    return {
        "metric": metric,
        "temperature": settings.get("temperature"),
        "num_draft_tokens": settings.get("num_draft_tokens"),
        "batch_size": settings.get("batch_size"),
        "repetitions": summary.get("repetitions"),
        "prompts": summary["rules"][VERIFIER].get("prompts"),
        "table2": table2(points),
        "points": {name: [asdict(point) for point in line] for name, line in points.items()},
    }


def write_frontier(entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """``frontier.json``; its figures are drawn by :func:`deferral_train.evaluation.figures.draw_frontier`."""
    provenance.write_json(folder / "frontier.json", {"entries": list(entries)})
