"""`run --probe`: what a pair could gain, from a hundred prompts, before hours are spent on it.

The prompts are split in two by prompt: on one half every plug-in rule is set to the wanted rejection rate and the
one that loses least is taken; on the other half it is judged beside the ends and the decision in hindsight, which no
position rule can beat on these tokens at temperature 0 or 1. Speeds are predicted from the measured cost of one pass
of each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deferral_train.errors import InputError
from deferral_train.evaluation import score_rules
from deferral_train.evaluation.bootstrap import MIN_PROMPTS
from deferral_train.evaluation.table import ScoreTable
from deferral_train.pipeline import operating_point
from deferral_train.pipeline.config import OperatingPointConfig
from deferral_train.pipeline.console import RunConsole
from deferral_train.traces import Traces
from deferral_train.traces.splits import split_prompts

PROMPTS = 100
HINDSIGHT = "hindsight (a bound, not a rule)"


def ceiling(
    traces: Traces,
    rules: Sequence[str],
    costs: Mapping[str, float],
    config: OperatingPointConfig,
    num_draft_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """The ceiling of a pair: lossless speculation, the best plug-in rule and hindsight, on prompts that chose nothing.

    Args:
        traces: of the probed prompts.
        rules: plug-in rules, by spec without a dial value.
        costs: seconds of one ``drafter`` and one ``verifier`` pass.

    Returns:
        ``cost_ratio``, ``chosen`` (rule, parameter, value), ``rows`` (one per line of the table: ``tokens_per_call``,
        ``speed`` predicted against the verifier alone, ``risk`` of the emitted token and ``low``, ``high`` of its
        difference to lossless), ``worth_it`` and ``reason``.

    Raises:
        InputError: too few prompts for two halves with intervals.
    """
    if len(traces.prompt_ids) < 2 * MIN_PROMPTS:
        raise InputError(
            f"probe: {len(traces.prompt_ids)} calibration prompts are too few for two halves with intervals; "
            f"give at least {2 * MIN_PROMPTS}"
        )
    first, second = split_prompts(traces, (0.5, 0.5), seed)
    points = operating_point.choose_points(
        first, {rule: rule for rule in rules}, config, num_draft_tokens, seed
    )
    best = points["best"]
    chosen = {name: points["points"][best][name] for name in ("parameter", "value")}
    label = operating_point.with_value(best, chosen["parameter"], chosen["value"])
    table = score_rules(
        second,
        {best: best},
        # The loss of the emitted token, so that hindsight bounds what is shown.
        loss="zero_one" if traces.manifest.temperature == 0 else "prob",
        grid={best: [chosen["value"]]},
        seed=seed,
        costs=costs,
        num_draft_tokens=num_draft_tokens,
    )
    rows = [
        _row(table, "lossless", "lossless"),
        _row(table, best, f"{label} (best plug-in)"),
        _hindsight(table, best),
        _row(table, "drafter_only", "drafter_only"),
    ]
    ratio = costs["verifier"] / costs["drafter"]
    reason = _reason(rows, ratio)
    return {
        "prompts": {"chosen_on": len(first.prompt_ids), "judged_on": len(second.prompt_ids)},
        "prefixes": traces.manifest.prefixes,
        "temperature": table.meta["temperature"],
        "cost_ratio": ratio,
        "chosen": {"rule": best, **chosen},
        "rows": rows,
        "worth_it": reason is None,
        "reason": reason,
    }


METRICS = ("acceptance_length", "relative_latency", "rejection_rate", operating_point.LOSS)


def _row(table: ScoreTable, name: str, shown: str) -> dict[str, Any]:
    """A line of the table for a rule of one setting."""
    scores = table[name]
    values = {metric: float(scores.metrics[metric][0]) for metric in METRICS}
    return _cells(table, shown, values, scores.redrawn[operating_point.LOSS][0])


def _hindsight(table: ScoreTable, best: str) -> dict[str, Any]:
    """The oracle at the best plug-in's rejection rate, between its own settings where need be."""
    rates = [float(table[name].metrics["rejection_rate"][0]) for name in (best, "lossless")]
    share = [min(1.0, rates[0] / rates[1] if rates[1] else 1.0)]
    found = {metric: table.curve("oracle", metric).at(share) for metric in METRICS}
    values = {metric: float(value[0]) for metric, (value, _) in found.items()}
    return _cells(table, HINDSIGHT, values, found[operating_point.LOSS][1][0])


def _cells(table: ScoreTable, shown: str, values: Mapping[str, float], risk: np.ndarray) -> dict[str, Any]:
    base = table["lossless"]
    difference = values[operating_point.LOSS] - float(base.metrics[operating_point.LOSS][0])
    interval = table.bootstrap.interval(difference, risk - base.redrawn[operating_point.LOSS][0])
    return {
        "rule": shown,
        "tokens_per_call": values["acceptance_length"],
        "speed": 1 / values["relative_latency"],
        "rejection_rate": values["rejection_rate"],
        "risk": values[operating_point.LOSS],
        "difference": difference,
        "low": interval.low,
        "high": interval.high,
    }


def _reason(rows: Sequence[Mapping[str, Any]], ratio: float) -> str | None:
    """Why no head can help here, or None."""
    most = max(row["speed"] for row in rows)
    if most <= 1:
        return (
            f"even if every draft were kept the cascade would run at {most:.2f}x the verifier's speed: its pass "
            f"costs {ratio:.1f} drafter passes; use a larger verifier or a smaller drafter"
        )
    spared = rows[1]["risk"] - rows[2]["risk"]
    if spared <= 0:
        return "hindsight loses no less than the best plug-in rule: there is nothing for a head to learn"
    return None


def show(console: RunConsole, found: Mapping[str, Any]) -> None:
    """Print the ceiling as a table and one line."""
    columns = [
        "rule",
        "tokens/call",
        "predicted speed",
        "rejected",
        "risk",
        "- lossless",
        "95% interval",
    ]
    cells = [
        [
            row["rule"],
            row["tokens_per_call"],
            row["speed"],
            row["rejection_rate"],
            row["risk"],
            row["difference"],
            f"{row['low']:+.3f} to {row['high']:+.3f}",
        ]
        for row in found["rows"]
    ]
    count = found["prompts"]
    console.table(
        f"the ceiling, judged on {count['judged_on']} prompts ({found['prefixes']} prefixes, temperature "
        f"{found['temperature']:g}); dials and the best plug-in chosen on {count['chosen_on']} others",
        columns,
        cells,
    )
    console.line(f"a verifier pass costs {found['cost_ratio']:.1f} drafter passes")
    console.line(f"not worth going on: {found['reason']}" if found["reason"] else _worth(found["rows"]))


def _worth(rows: Sequence[Mapping[str, Any]]) -> str:
    lossless, plug_in, hindsight, drafter = rows
    pays = max(lossless["speed"], plug_in["speed"]) > 1
    advice = "worth going on" if pays else "worth going on only for settings that keep nearly every draft"
    return (
        f"{advice}: predicted speed {lossless['speed']:.2f}x the verifier's lossless, {plug_in['speed']:.2f}x with the "
        f"best plug-in, {drafter['speed']:.2f}x at most; at the plug-in's rejection rate a head can save at most "
        f"{plug_in['risk'] - hindsight['risk']:.3f} of token risk"
    )
