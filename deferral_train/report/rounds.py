"""The section on rounds of learning from finished texts: quality lost against calls, and prediction against count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deferral_train.report.load import RunFolder
from deferral_train.report.sections import colours
from deferral_train.report.svg import Series, line_chart, nice


def rounds(run: RunFolder) -> dict[str, Any] | None:
    """Chart, legend and a row per round; None where there were none."""
    if run.rounds is None:
        return None
    content = run.rounds
    best = {f"round {one['round']}": _best(one) for one in content["rounds"]}
    palette = colours(list(best))
    series = [
        Series(
            name,
            [point["calls"] for point in one["points"]],
            [point["loss"] for point in one["points"]],
            colour=palette[name],
            notes=[
                f"alpha {nice(point['alpha'])}: length {nice(point['length'])}" for point in one["points"]
            ],
        )
        for name, one in best.items()
    ]
    unit = " and ".join(content["settings"]["metrics"])
    return {
        "unit": unit,
        "calls": content["settings"]["calls"],
        "svg": line_chart(
            "Quality lost against verifier calls", series, "calls over lossless's", "quality lost"
        ),
        "legend": [{"name": name, "colour": colour} for name, colour in palette.items()],
        "rows": [_row(record, content["chosen"]) for record in content["rounds"]],
    }


def _best(record: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(one for one in record["candidates"] if one["head"] == record["best"])
    return found


def _row(record: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    best = _best(record)
    at = best["at_calls"]
    return {
        "round": record["round"],
        "chosen": chosen is not None and chosen["round"] == record["round"],
        "labelled": f"{record['labelled']:,}",
        "price": nice(best["length_price"]),
        **{name: nice(at[name]) for name in ("alpha", "calls", "loss", "length")},
        "predicted": [
            f"{name}: {nice(100 * one['predicted'])} against {nice(100 * one['counted'])}"
            for name, one in record.get("predicted", {}).items()
            if "counted" in one
        ],
    }
