"""The page's sections as plain values and charts; None where a run did not measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from deferral_train.evaluation.bootstrap import Interval
from deferral_train.evaluation.online import online_table
from deferral_train.report.load import RunFolder
from deferral_train.report.numbers import cell, interval, limits, nice, signed
from deferral_train.report.svg import Series, bar_chart, line_chart

RIGHT = "answers right"  # execution accuracy, in the page's words
ENDS = ("drafter_only", "lossless", "verifier_only")
# Curves that are not drawn as rules of their own: the two ends are points, the oracle is a dashed bound.
LOSS_NAMES = {"risk": "risk (loss of the model left in charge)", "emitted_risk": "risk of the emitted token"}
COST_NAMES = {
    "rejection_rate": "rejection rate",
    "calls_per_token": "verifier calls per token (predicted)",
    "relative_latency": "time relative to the verifier alone (predicted)",
}


def colours(names: Sequence[str]) -> dict[str, int]:
    """A colour per rule: heads 0, OPT 1, the ends and the oracle 2, the others 3 to 11 in turn."""
    found, following = {}, 0
    for name in names:
        if is_head(name):
            found[name] = 0
        elif name.split(":")[0] == "opt":
            found[name] = 1
        elif name.split(":")[0] in (*ENDS, "oracle"):
            found[name] = 2
        else:
            found[name] = 3 + following % 9
            following += 1
    return found


def is_head(name: str) -> bool:
    """True where a rule's name says that it is a learned one."""
    return name.startswith(("learned", "head"))


def curves(run: RunFolder) -> dict[str, Any] | None:
    """Offline curves of all rules, and the table at matched cost."""
    if run.scores is None:
        return None
    has = {metric for point in run.scores["points"] for metric in point}
    # At temperature 0 under the zero-one loss both risks are the same number.
    same = run.scores["meta"]["temperature"] == 0 and run.scores["meta"]["loss"] == "zero_one"
    losses = (
        ["emitted_risk"] if same and "emitted_risk" in has else [loss for loss in LOSS_NAMES if loss in has]
    )
    charts = [_curve_chart(run.scores, loss, "rejection_rate") for loss in losses]
    price = "relative_latency" if "relative_latency" in has else "calls_per_token"
    charts.append(_curve_chart(run.scores, losses[0] if same else losses[-1], price))
    names = [point["rule"] for point in run.scores["points"]]
    return {
        "meta": run.scores["meta"],
        "charts": [chart for chart in charts if chart["svg"]],
        "legend": _legend(names),
        "matched": _matched(run.scores),
    }


def _legend(names: Sequence[str]) -> list[dict[str, Any]]:
    unique = list(dict.fromkeys(name for name in names if name not in ENDS))
    return [{"name": name, "colour": colour} for name, colour in colours(unique).items()]


def _curve_chart(scores: Mapping[str, Any], loss: str, cost: str) -> dict[str, Any]:
    points = [point for point in scores["points"] if loss in point and cost in point]
    palette = colours(list(dict.fromkeys(point["rule"] for point in points)))
    series = []
    for name, colour in palette.items():
        own = sorted((p for p in points if p["rule"] == name), key=lambda point: point[cost]["value"])
        kind = "points" if len(own) == 1 else "dashed" if name == "oracle" else "line"
        series.append(_series(name, own, loss, cost, colour, kind))
    title = f"{LOSS_NAMES[loss]} against {COST_NAMES[cost]}"
    return {"title": title, "svg": line_chart(title, series, COST_NAMES[cost], LOSS_NAMES[loss])}


def _series(
    name: str, points: Sequence[Mapping[str, Any]], loss: str, cost: str, colour: int, kind: str
) -> Series:
    band = is_head(name) or name == "opt"
    notes = [
        (f"{p['parameter']} = {nice(p['value'])}, " if p["value"] is not None else "")
        + f"{cost} {nice(p[cost]['value'])}, {loss} {interval(p[loss])}"
        for p in points
    ]
    return Series(
        name,
        [p[cost]["value"] for p in points],
        [p[loss]["value"] for p in points],
        [p[loss]["low"] for p in points] if band else None,
        [p[loss]["high"] for p in points] if band else None,
        colour,
        kind,
        notes,
    )


def _matched(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Risk of the emitted token at matched rejection rate where known, else risk; and the difference to
    OPT.
    """
    rows = [row for row in scores["matched"] if row["cost"] == "rejection_rate"]
    loss = "emitted_risk" if any(row["loss"] == "emitted_risk" for row in rows) else "risk"
    rows = [row for row in rows if row["loss"] == loss]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    table = []
    for name in dict.fromkeys(row["rule"] for row in rows):
        by_share = {row["share"]: row for row in rows if row["rule"] == name}
        cells = [by_share.get(share) for share in shares]
        table.append(
            {
                "rule": name,
                "values": [cell(one, _thousandths) for one in cells],
                "differences": [
                    cell(one and one["minus_baseline"], partial(_thousandths, sign=True)) for one in cells
                ],
            }
        )
    return {"loss": LOSS_NAMES[loss], "shares": [_share(share) for share in shares], "rows": table}


def _thousandths(value: float, sign: bool = False) -> str:
    rounded = round(value, 3) or 0.0  # no minus sign before a zero
    return f"{rounded:{'+' if sign and rounded else ''}.3f}".replace("-", "−")


def _share(share: float | str) -> str:
    return "whole curve" if share == "area" else f"{share:.0%}"


def online(run: RunFolder) -> dict[str, Any] | None:
    """Counts of decoding, one row per rule, and quality against verifier calls."""
    if run.summary is None:
        return None
    rules = {name: _with_short_names(rule) for name, rule in run.summary["rules"].items()}
    paired = online_table(run.outputs, run.batches) if run.outputs else {}
    rows = [_online_row(name, rule, paired.get(name, {}), run.verdict) for name, rule in rules.items()]
    metrics = [
        m
        for m in (RIGHT, "chrf", "bleu", "exact_match")
        if any(m in rule["quality"] for rule in rules.values())
    ]
    return {
        "rows": rows,
        "metrics": metrics,
        "settings": run.summary.get("settings", {}),
        "repetitions": run.summary.get("repetitions"),
        "not_run": list(run.summary.get("not_run", {}).items()),
        "chart": _online_chart(rules, metrics[0]) if metrics else Markup(""),
    }


def _with_short_names(rule: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's summary whose execution accuracy is called so, and not by its database."""
    quality = {RIGHT if name.startswith("sql:") else name: value for name, value in rule["quality"].items()}
    return {**rule, "quality": quality}


def _online_row(
    name: str, rule: Mapping[str, Any], paired: Mapping[str, Interval], verdict: Mapping[str, Any] | None
) -> dict[str, Any]:
    chosen = ((verdict or {}).get("chosen") or {}).get("label")
    return {
        "name": name,
        "chosen": name == chosen,
        "quality": {
            metric: nice(value) for metric, value in rule["quality"].items() if isinstance(value, float)
        },
        "speed": _paired(paired.get("speed")),
        "difference": _paired(paired.get("quality_difference"), 100, sign=True),
        "ms": nice(rule.get("ms_per_token")),
        "acceptance": nice(rule.get("mean_acceptance_length")),
        "calls": nice(rule.get("verifier_calls_per_token")),
        "deferral": nice(rule.get("deferral_rate")),
        "rejection": nice(rule.get("rejection_rate")),
        "tokens": nice(rule.get("mean_output_tokens")),
    }


def _paired(number: Interval | None, scale: float = 1.0, sign: bool = False) -> dict[str, str]:
    """A cell with the interval below the value."""
    if number is None:
        return {"value": "–", "range": ""}
    between = (
        "" if number.low is None or number.high is None else limits(number.low, number.high, scale, sign)
    )
    return {"value": signed(number.value * scale, sign), "range": between}


def _online_chart(rules: Mapping[str, Any], metric: str) -> Markup:
    palette = colours(list(rules))
    series = [
        Series(
            name,
            [rule["verifier_calls_per_token"]],
            [rule["quality"][metric]],
            colour=palette[name],
            kind="points",
        )
        for name, rule in rules.items()
        if metric in rule["quality"] and rule.get("verifier_calls_per_token") is not None
    ]
    return line_chart(
        f"{metric} against verifier calls per token",
        series,
        "verifier calls per token (counted)",
        metric,
        labels=True,
    )


def training(run: RunFolder) -> list[dict[str, Any]] | None:
    """Regret and loss over training, from the log of the fit."""
    wanted = {
        "Regret on validation": ("val/regret", "val/exact_regret", "val/excess_over_opt"),
        "Training loss": ("train/loss", "train/loss_step", "train/loss_epoch"),
    }
    charts = []
    for title, tags in wanted.items():
        lines = [(tag, run.training[tag]) for tag in tags if run.training.get(tag)]
        series = [
            Series(tag, [step for step, _ in line], [value for _, value in line], colour=number)
            for number, (tag, line) in enumerate(lines)
        ]
        if series:
            svg = line_chart(title, series, "optimizer step", title, zero="regret" in title.lower())
            charts.append(
                {"title": title, "svg": svg, "legend": [{"name": s.name, "colour": s.colour} for s in series]}
            )
    return charts or None


def calibration(run: RunFolder) -> list[dict[str, Any]] | None:
    """Predicted against observed loss gap of each estimator."""
    found = (run.scores or {}).get("calibration") or {}
    palette = colours(list(found))
    charts = []
    for name, of in found.items():
        bins = of["bins"]
        series = Series(
            name,
            [row["predicted"] for row in bins],
            [row["observed"]["value"] for row in bins],
            [row["observed"]["low"] for row in bins],
            [row["observed"]["high"] for row in bins],
            palette[name],
            "points",
        )
        title = f"Loss gap: predicted by {name} against observed"
        charts.append(
            {
                "name": name,
                "svg": line_chart(title, [series], "predicted gap", "observed gap", diagonal=True),
                "error": nice(of["calibration_error"]),
                "bias": nice(of["bias"]),
                "correlation": nice(of["correlation"]),
            }
        )
    return charts or None


def skew(run: RunFolder) -> dict[str, Any] | None:
    """Predicted from traces against counted by decoding."""
    if run.skew is None:
        return None
    rows = [
        {
            "rule": row["rule"],
            "quantity": row["quantity"],
            "predicted": nice(row["predicted"]),
            "counted": nice(row["counted"]),
            "difference": interval(row["difference"], sign=True),
            "relative": "–" if row["relative"] is None else f"{row['relative']:+.1%}",
            "agrees": row["agrees"],
        }
        for row in run.skew["rows"]
    ]
    return {"meta": run.skew["meta"], "rows": rows}


def length(run: RunFolder) -> dict[str, Any] | None:
    """Mean output length of each rule, and its ratio to lossless."""
    if run.summary is None:
        return None
    rules = {name: rule for name, rule in run.summary["rules"].items() if rule.get("mean_output_tokens")}
    if not rules:
        return None
    base = rules.get("lossless", rules.get("verifier_only", {})).get("mean_output_tokens")
    rows = [
        {
            "name": name,
            "tokens": nice(rule["mean_output_tokens"]),
            "ratio": f"{rule['mean_output_tokens'] / base - 1:+.1%}" if base else "–",
        }
        for name, rule in rules.items()
    ]
    values = [rule["mean_output_tokens"] for rule in rules.values()]
    numbers = [str(number + 1) for number in range(len(values))]
    return {
        "rows": rows,
        "svg": bar_chart("Mean output tokens per rule", numbers, values, "tokens per prompt", 1),
    }
