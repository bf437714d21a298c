"""Online evaluation from `decode` files: quality, speed and length of every rule, with paired intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deferral_train.evaluation.bootstrap import Interval, Redraws
from deferral_train.evaluation.quality import gold, per_prompt


def online_table(
    rows: Sequence[Mapping[str, Any]],
    batches: Sequence[Mapping[str, Any]],
    *,
    metric: str = "chrf",
    base: str = "lossless",
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Paired comparisons of every rule.

    Args:
        rows: of ``outputs.jsonl``. batches: of ``batches.jsonl``.
        metric: per-prompt metric, see :mod:`quality`; left out where prompts have no references.
        base: rule that quality and length are compared to, on the same prompts.

    Returns:
        by rule: ``quality`` (mean, in [0, 1]), ``quality_difference`` and ``length_ratio`` against ``base``,
        and ``speed``: seconds of ``verifier_only`` over the rule's, medians over repetitions per batch,
        batches redrawn together. What the files do not hold is left out; below ``MIN_PROMPTS`` units there
        are no limits.
    """
    first = [row for row in rows if row["repetition"] == 0]
    by_rule: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in first:
        by_rule[row["rule"]][str(row["id"])] = row
    speeds = speed_table(batches, seed)
    table: dict[str, dict[str, Interval]] = {}
    for rule, own in by_rule.items():
        found = _against_base(own, by_rule.get(base, {}), metric, seed)
        if rule in speeds:
            found["speed"] = speeds[rule]
        table[rule] = found
    return table


def speed_table(batches: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Interval]:
    """Seconds of ``verifier_only`` over each rule's, medians over repetitions per batch, batches redrawn
    together; empty where the verifier alone was not decoded.
    """
    seconds = _median_seconds(batches)
    if "verifier_only" not in seconds:
        return {}
    return {rule: _ratio(seconds["verifier_only"], own, seed) for rule, own in seconds.items()}


def _against_base(
    own: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]], metric: str, seed: int
) -> dict[str, Interval]:
    ids = [name for name in own if name in base] if base else []
    if not ids:
        return {}
    redraws = Redraws(seed=seed).over(len(ids))
    lengths = [_column(part[name]["counts"]["emitted"] for name in ids) for part in (own, base)]
    found = {"length_ratio": redraws.ratio(*lengths)}
    if all(gold(metric, own[name]) is not None for name in ids):
        scores = [
            per_prompt(metric, [part[i]["text"] for i in ids], [gold(metric, part[i]) for i in ids])
            for part in (own, base)
        ]
        found["quality"] = redraws.mean(scores[0])
        found["quality_difference"] = redraws.mean(scores[0] - scores[1])
    return found


def _median_seconds(batches: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Median over repetitions of each batch's seconds, by rule and batch."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for batch in batches:
        found[batch["rule"]][batch["batch"]].append(batch["seconds"])
    return {rule: {number: float(np.median(s)) for number, s in by.items()} for rule, by in found.items()}


def _ratio(above: Mapping[int, float], below: Mapping[int, float], seed: int) -> Interval:
    shared = sorted(set(above) & set(below))
    return (
        Redraws(seed=seed)
        .over(len(shared))
        .ratio(_column(above[number] for number in shared), _column(below[number] for number in shared))
    )


def _column(values: Iterable[float]) -> np.ndarray:
    return np.fromiter(values, dtype=np.float64)
