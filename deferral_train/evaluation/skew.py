"""Offline meets online: what traces predict against what the decoding loop counted, on the same prompts.

Heads that look good offline and collapse when served are this field's recurring failure, so the difference
is a number with an interval, per rule. Predictions follow blocks position by position (:mod:`survival`);
on prefixes of the very rule that was decoded (``cascade:<rule>``) they are exact when greedy, and when
sampling up to what a drawn token says about its own acceptance (:mod:`survival`), which moves only where
blocks end. On teacher-forced prefixes the difference mixes two things, the model of the loop and
the other prefixes, and is to be read as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deferral_train.decoding.settings import Settings
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import Interval, PromptBootstrap, Redraws
from deferral_train.evaluation.positions import read_positions
from deferral_train.evaluation.settings import parse_label
from deferral_train.evaluation.survival import expected_work
from deferral_train.rules.base import LawRule, Rule
from deferral_train.traces import Traces

RELATIVE = 0.03
ON_POLICY = "On-policy prefixes: predictions are expected to agree within 3% or their interval."
OFF_POLICY = "Prefixes that the rule itself did not produce: the difference includes their shift."
# Quantity -> (numerator, denominator) of sums over prompts, in predictions and in counts alike.
QUANTITIES = {
    "acceptance": ("passed", "judged"),
    "deferral rate": ("deferred", "judged"),
    "tokens per verifier call": ("tokens", "calls"),
}


@dataclass(frozen=True)
class WorkSums:
    """Sums per prompt, predicted or counted.

    Attributes:
        prompt_ids: [P].
        sums: [P] by name: calls, judged, passed, deferred, tokens.
    """

    prompt_ids: tuple[str, ...]
    sums: dict[str, np.ndarray]

    def select(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """The sums of some prompts, in their order."""
        number_of = {name: number for number, name in enumerate(self.prompt_ids)}
        rows = np.array([number_of[name] for name in ids], dtype=np.int64)
        return {name: values[rows] for name, values in self.sums.items()}


def predict(
    traces: Traces,
    rule: Rule,
    *,
    temperature: float | None = None,
    num_draft_tokens: int = Settings.num_draft_tokens,
    tails: Sequence[float] = (0.0,),
) -> list[WorkSums]:
    """Expected work per prompt if ``rule`` decoded the logged sequences, under the limit of tokens that they had.

    Args:
        tails: where the candidates that were not logged put the rejection: 0 the middle of its bounds, 1 the most, -1
            the least.

    Returns:
        one for each of ``tails``.
    """
    table = read_positions(
        traces, rule.needs, truth="verifier", temperature=temperature, with_candidates=True
    )
    settings = traces.manifest.settings
    work = expected_work(
        table, [rule], num_draft_tokens,
        limit=settings.get("max_new_tokens"), tails=tails, served=settings.get("blocks") == "served",
    )  # fmt: skip
    assert work.deferred is not None
    sums = {
        "calls": work.calls,
        "judged": work.judged,
        "passed": work.judged - work.rejected,
        "deferred": work.deferred,
    }
    tokens = {"tokens": table.rows_per_prompt.astype(np.float64)}
    return [
        WorkSums(tuple(table.prompt_ids), {name: values[:, side] for name, values in sums.items()} | tokens)
        for side in range(len(tails))
    ]


def count(rows: Iterable[Mapping[str, Any]]) -> WorkSums:
    """Counted work per prompt from one rule's rows of ``outputs.jsonl``, repetitions added up."""
    totals: dict[str, np.ndarray] = {}
    for row in rows:
        counts = row["counts"]
        passed = counts["decided"] - counts["rejected"]
        line = (counts["verifier_calls"], counts["decided"], passed, counts["deferred"], counts["emitted"])
        totals[str(row["id"])] = totals.get(str(row["id"]), 0) + np.array(line, dtype=np.float64)
    if not totals:
        raise InputError("no outputs of this rule to count; decode it first")
    columns = np.stack(list(totals.values())).T
    return WorkSums(tuple(totals), dict(zip(("calls", "judged", "passed", "deferred", "tokens"), columns)))


def compare(
    traces: Traces,
    label: str,
    rule: Rule,
    rows: Iterable[Mapping[str, Any]],
    *,
    temperature: float | None = None,
    num_draft_tokens: int = Settings.num_draft_tokens,
    bootstrap: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Predicted against counted for one rule.

    Args:
        traces: with the same prompts; other prompts are left out.
        label: the rule's name in ``rows``.
        rows: of ``outputs.jsonl``, any rules.

    Returns:
        one row per quantity (distribution rules decide nothing, so they have no deferral rate): predicted, counted,
        their difference with a paired interval over prompts, the relative difference, ``agrees``: within
        3% relative, or the interval holds 0; and ``tail``, the lowest and highest prediction that the unlogged
        candidates allow (the log of more candidates narrows it).

    Raises:
        InputError: no common prompts.
    """
    predicted, *extremes = predict(
        traces, rule, temperature=temperature, num_draft_tokens=num_draft_tokens, tails=(0.0, -1.0, 1.0)
    )
    counted = count(row for row in rows if row["rule"] == label)
    ids = [name for name in predicted.prompt_ids if name in set(counted.prompt_ids)]
    if not ids:
        raise InputError(
            f"traces and outputs of {label} share no prompt id; decode the prompts that were collected"
        )
    before, after = predicted.select(ids), counted.select(ids)
    redraws = Redraws(bootstrap, seed).over(len(ids))
    return [
        {
            "rule": label,
            "prefixes": traces.manifest.prefixes,
            "on_policy": is_on_policy(traces.manifest.prefixes, rule),
            "prompts": len(ids),
            "quantity": name,
        }
        | _difference(before, after, top, bottom, redraws)
        | {"tail": sorted(_ratio(side.select(ids), top, bottom) for side in extremes)}
        for name, (top, bottom) in QUANTITIES.items()
        if before[bottom].sum() > 0 and after[bottom].sum() > 0
        if top != "deferred" or not isinstance(rule, LawRule)
    ]


def is_on_policy(prefixes: str, rule: Rule) -> bool:
    """True where prefixes of this manifest entry were produced by the very rule, dial value included."""
    if not prefixes.startswith("cascade:"):
        return False
    spec = prefixes.removeprefix("cascade:")
    setting = parse_label(spec)
    if setting is None or rule.dial_value is None:
        return spec.split(":")[0] == rule.name
    return setting.rule == rule.name and math.isclose(setting.value, rule.dial_value)


def _ratio(part: Mapping[str, np.ndarray], top: str, bottom: str) -> float:
    return float(part[top].sum() / part[bottom].sum())


def _difference(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    top: str,
    bottom: str,
    redraws: PromptBootstrap,
) -> dict[str, Any]:
    predicted, counted = (_ratio(part, top, bottom) for part in (before, after))
    difference = Interval(counted - predicted)
    if redraws.replicates:
        samples = [redraws.sums(part[top]) / redraws.sums(part[bottom]) for part in (after, before)]
        difference = redraws.interval(counted - predicted, samples[0] - samples[1])
    relative = difference.value / counted if counted else None
    inside = (
        difference.low is not None and difference.high is not None and difference.low <= 0 <= difference.high
    )
    close = relative is not None and abs(relative) <= RELATIVE
    return {
        "predicted": predicted,
        "counted": counted,
        "difference": difference.as_dict(),
        "relative": relative,
        "agrees": bool(close or inside or difference.value == 0),
    }


def table_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of ``evaluation/skew.json``: a header, and the rows of :func:`compare`."""
    prefixes = sorted({row["prefixes"] for row in rows})
    on_policy = all(row["on_policy"] for row in rows)
    note = ON_POLICY if on_policy else OFF_POLICY
    agree = sum(bool(row["agrees"]) for row in rows)
    meta = {
        "prompts": max((row["prompts"] for row in rows), default=0),
        "prefixes": ", ".join(prefixes),
        "on_policy": on_policy,
        "note": note,
        "agree": agree,
        "of": len(rows),
    }
    return {"meta": meta, "rows": list(rows)}
