"""The section on whole rules, decoded: quality against deferrals, rejections, verifier calls and latency, and the
paper's Table 2, one block per temperature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deferral_train.evaluation.frontier import COSTS
from deferral_train.report.load import RunFolder
from deferral_train.report.numbers import nice
from deferral_train.report.sections import colours
from deferral_train.report.svg import Series, line_chart

# In the order of the page: what a user pays first.
SHOWN = ("latency", "calls_per_token", "deferral_rate", "rejection_rate")


def frontier(run: RunFolder) -> list[dict[str, Any]] | None:
    """One block per temperature: charts, legend and Table 2."""
    if run.frontier is None:
        return None
    return [_block(entry) for entry in run.frontier["entries"]]


def _block(entry: Mapping[str, Any]) -> dict[str, Any]:
    palette = colours(list(entry["points"]))
    return {
        **{name: entry.get(name) for name in ("metric", "temperature", "num_draft_tokens", "prompts")},
        "timed": entry.get("timed_prompts") or entry.get("prompts"),
        "repetitions": entry.get("repetitions"),
        "charts": [
            {"title": _title(entry, cost), "svg": _chart(entry, cost, palette)}
            for cost in SHOWN
            if cost in COSTS
        ],
        "legend": [{"name": name, "colour": colour} for name, colour in palette.items()],
        "rows": [_row(row) for row in entry["table2"]],
    }


def _title(entry: Mapping[str, Any], cost: str) -> str:
    return f"{entry['metric']} against {COSTS[cost]}, T = {entry['temperature']:g}"


def _chart(entry: Mapping[str, Any], cost: str, palette: Mapping[str, int]) -> str:
    series = [_series(name, line, cost, palette[name]) for name, line in entry["points"].items()]
    return line_chart(_title(entry, cost), series, COSTS[cost], entry["metric"])


def _series(name: str, line: Sequence[Mapping[str, Any]], cost: str, colour: int) -> Series:
    ordered = sorted(line, key=lambda point: point[cost])
    return Series(
        name,
        [point[cost] for point in ordered],
        [point["quality"] for point in ordered],
        colour=colour,
        kind="points" if len(ordered) == 1 else "line",
        notes=[f"{point['label']}: {nice(point[cost])}, {nice(point['quality'])}" for point in ordered],
    )


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    def times(value: float | None) -> str:
        return "not reached" if value is None else f"{nice(value)}×"

    return {
        "rule": row["rule"],
        "settings": row["settings"],
        "speedup": times(row["speedup_at_quality"]),
        "calls": "not reached" if row["calls_at_quality"] is None else nice(row["calls_at_quality"]),
        "quality": "every setting is slower"
        if row["best_quality_within_latency"] is None
        else nice(row["best_quality_within_latency"]),
    }
