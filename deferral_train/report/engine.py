"""The section on a serving engine: the same prompts in this package's loop and in the engine, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deferral_train.evaluation.agreement import Agreement, Difference, agreements
from deferral_train.report.load import RunFolder
from deferral_train.report.numbers import nice

SHOWN = 20  # texts that differ, of each rule


def engine(run: RunFolder) -> dict[str, Any] | None:
    """Rows by rule and texts that differ; None where no engine decoded these prompts."""
    if run.engine is None:
        return None
    loop = run.summary["rules"] if run.summary is not None else {}
    found = agreements(run.outputs, run.engine_outputs)
    rules = run.engine["rules"]
    return {
        "ran": ran(run.engine),
        "rows": [_row(label, loop.get(label), rule, found.get(label)) for label, rule in rules.items()],
        "not_run": list(run.engine.get("not_run", {}).items()),
        "differences": [
            {"rule": label, **_difference(one)}
            for label, agreement in found.items()
            for one in agreement.differences[:SHOWN]
        ],
        "settings": run.engine.get("settings", {}),
        "tight": run.summary is not None and run.summary.get("settings", {}).get("blocks") != "served",
    }


def ran(summary: Mapping[str, Any]) -> list[str]:
    """Engines that decoded, with model runner, device and number format; empty where this package's loop did."""
    found = [rule["ran"] for rule in summary["rules"].values() if "ran" in rule]
    return list(
        dict.fromkeys(
            f"{one['engine']}, {one['runner']} runner, {one['device']}, {one['dtype']}" for one in found
        )
    )


def _row(
    label: str, loop: Mapping[str, Any] | None, rule: Mapping[str, Any], agreement: Agreement | None
) -> dict[str, Any]:
    quality = [_quality(one) for one in (loop, rule)]
    return {
        "rule": label,
        "speed": [nice(one["tokens_per_second"] if one else None) for one in (loop, rule)],
        "length": [nice(one["mean_acceptance_length"] if one else None) for one in (loop, rule)],
        "deferral": [nice(one["deferral_rate"] if one else None) for one in (loop, rule)],
        "quality": quality,
        "same": "–" if agreement is None else f"{agreement.same} of {agreement.prompts}",
        "ties": "–" if agreement is None else str(agreement.ties),
    }


def _quality(rule: Mapping[str, Any] | None) -> str:
    """chrF where there are references."""
    return nice((rule or {}).get("quality", {}).get("chrf"))


def _difference(one: Difference) -> dict[str, Any]:
    gaps: Sequence[float | None] = (one.verifier_gap, one.drafter_gap)
    return {
        "prompt": one.prompt,
        "place": one.place,
        "gaps": ["–" if gap is None else f"{gap:.4f}" for gap in gaps],
        "kind": "tie" if one.tie else "not known" if one.verifier_gap is None else "no tie",
    }
