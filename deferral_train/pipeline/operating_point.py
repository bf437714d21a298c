"""The operating points: every rule's dial set on the calibration part to the same price, and the best rule there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deferral_train.evaluation import score_rules
from deferral_train.evaluation.choose import least_limit
from deferral_train.evaluation.table import ScoreTable
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pipeline.config import OperatingPointConfig
from deferral_train.rules.base import Rule
from deferral_train.traces import Traces

# Fine enough that neighbouring settings differ by less than a point of rejection rate on real pairs.
DIAL_POINTS = 201
SPREAD_POINTS, SPREAD_PROMPTS = 61, 100
# Comparisons across rule families need the loss of the token that is emitted, not of the model deferred to.
LOSS = "emitted_risk"


def choose_points(
    traces: Traces,
    rules: Mapping[str, Rule | str],
    config: OperatingPointConfig,
    num_draft_tokens: int,
    seed: int,
    learned: str | None = None,
) -> dict[str, Any]:
    """Dial value of every rule that comes nearest to the wanted rejection rate, and the rule that loses least there.

    Args:
        traces: of the calibration part.
        rules: name to be shown -> rule or spec; dials are swept.
        learned: name of the one that is no plug-in rule.

    Returns:
        ``{"target_rejection_rate", "points": {name: {...}}, "best", "best_plug_in"}``; risks are token error rates.
    """
    table = score_rules(
        traces, dict(rules), grid=DIAL_POINTS, bootstrap=0, num_draft_tokens=num_draft_tokens, seed=seed
    )
    target = config.rejection_share * float(table["lossless"].metrics["rejection_rate"][0])
    points = {name: _nearest(table, name, target, config.rejection_share) for name in rules}
    return {
        "target_rejection_rate": target,
        "points": points,
        "best": min(points, key=lambda name: points[name]["risk_at_match"]),
        "best_plug_in": min(
            (name for name in points if name != learned), key=lambda name: points[name]["risk_at_match"]
        ),
        "lossless_risk": float(table["lossless"].metrics[LOSS][0]),
        "drafter_risk": float(table["drafter_only"].metrics[LOSS][0]),
    }


def spread(
    traces: Traces,
    rules: Mapping[str, Rule | str],
    shares: Sequence[float],
    temperature: float,
    num_draft_tokens: int,
) -> dict[str, list[tuple[str, float]]]:
    """Dial values of every rule at shares of lossless's rejection rate on these traces, as (parameter, value).

    Rates are known for the temperature of the traces, 0 and 1; other temperatures take those of 1. A spread
    needs no more than :data:`SPREAD_PROMPTS` prompts.
    """
    known = temperature if temperature in (0.0, 1.0, traces.manifest.temperature) else 1.0
    table = score_rules(
        traces.select_prompts(list(traces.prompt_ids)[:SPREAD_PROMPTS]),
        dict(rules),
        grid=SPREAD_POINTS,
        bootstrap=0,
        temperature=known,
        num_draft_tokens=num_draft_tokens,
    )
    whole = float(table["lossless"].metrics["rejection_rate"][0])
    found: dict[str, list[tuple[str, float]]] = {}
    for name in rules:
        scores = table[name]
        rates = scores.metrics["rejection_rate"]
        places = dict.fromkeys(int(np.abs(rates - share * whole).argmin()) for share in shares)
        if scores.parameter is not None:
            found[name] = [(scores.parameter, float(scores.values[place] or 0.0)) for place in places]
    return found


def _nearest(table: ScoreTable, name: str, target: float, share: float) -> dict[str, Any]:
    scores = table[name]
    rates = scores.metrics["rejection_rate"]
    index = int(np.abs(rates - target).argmin())
    at_match, _ = table.curve(name, LOSS).at([share])
    return {
        "parameter": scores.parameter,
        "value": scores.values[index],
        "rejection_rate": float(rates[index]),
        "risk": float(scores.metrics[LOSS][index]),
        "risk_at_match": float(at_match[0]),
        "predicted_acceptance_length": float(scores.metrics["acceptance_length"][index]),
    }


def token_risk_bound(traces: Traces, rule: Rule, confidence: float) -> dict[str, Any]:
    """Upper limit of the rise of the local token risk over lossless's that prompts not used for choosing certify.

    The mean over prompts of (loss of the emitted token minus lossless's, on the same logged prefixes), each prompt's
    in [-1, 1]; the limit holds with ``confidence``. It says nothing about whole outputs.
    """
    table = score_rules(
        traces, {"chosen": rule}, grid=None if rule.dial_value is None else [rule.dial_value], bootstrap=0
    )
    loss, base = (table[name].per_prompt["emitted_loss"][0] for name in ("chosen", "lossless"))
    rises = (loss - base) / table.rows_per_prompt
    return {
        "kind": "local token risk",
        "mean": float(rises.mean()),
        "bound": least_limit(rises, confidence),
        "confidence": confidence,
        "prompts": len(rises),
    }


def with_value(spec: str, parameter: str | None, value: float | None) -> str:
    """``opt`` and 0.2 to ``opt:alpha=0.2``; ``learned:head=F`` and 0.1 to ``learned:head=F,alpha=0.1``."""
    if parameter is None or value is None:
        return spec
    # repr keeps every digit: a dial rounded for show could land on the other side of a step.
    return f"{spec}{',' if ':' in spec else ':'}{parameter}={value!r}"


def labelled(
    rules: Mapping[str, tuple[str, Rule | str]], dials: Mapping[str, Sequence[tuple[str, float]]]
) -> dict[str, Rule]:
    """Label, with the dial's value, to rule; ``rules`` name to (spec without a dial value, rule), ``dials`` of
    :func:`spread`.
    """
    return {
        f"{name}:{parameter}={value:g}": rule_from_spec(with_value(spec, parameter, value), [spec])
        for name, (spec, _) in rules.items()
        for parameter, value in dials.get(name, ())
    }
