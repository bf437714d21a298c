"""The last screen of a run: a short table of what was decoded, the verdict, and where to look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deferral_train.pipeline.console import RunConsole
from deferral_train.pipeline.stages import StageRecord
from deferral_train.redaction import redacted_text

KEPT = (
    "mean_acceptance_length",
    "deferral_rate",
    "rejection_rate",
    "tokens_per_second",
    "mean_output_tokens",
)


def short(scores: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """The part of a rule's decode summary that the closing table needs; ``quality`` is the metric as it is summed up
    (chrF from 0 to 100, others from 0 to 1).
    """
    return {name: scores[name] for name in KEPT} | {
        "quality": scores["quality"].get(redacted_text(metric)),
        "metric": redacted_text(metric),
    }


def close(console: RunConsole, records: Mapping[str, StageRecord], folder: Path) -> None:
    """Print the table, the verdict's headline and the paths."""
    decoded, verdict = records["decode"].result, records["verdict"].result
    found = records["point"].result
    points, best = found["points"], found["best_plug_in"]
    opt = points.get("opt", {}).get("risk_at_match")
    rows = [
        [
            f"{name} (best plug-in)" if name == best else name,
            scores["quality"],
            scores["mean_acceptance_length"],
            scores["deferral_rate"],
            scores["tokens_per_second"],
            None if opt is None or name not in points else points[name]["risk_at_match"] - opt,
        ]
        for name, scores in decoded.items()
    ]
    metric = next(iter(decoded.values()))["metric"].partition(":")[0]
    columns = [
        "rule",
        {"chrf": "chrF", "sql": "right"}.get(metric, metric),
        "tokens/call",
        "deferred",
        "tokens/s",
        "risk-OPT",
    ]
    console.table(
        "held-out prompts; dials and the best plug-in were chosen on a part of their own, at one rejection rate",
        columns,
        rows,
    )
    if found.get("constraint", {}).get("name") is not None:
        constraint, limit = found["constraint"], found["constraint"]["certificate"]["limit"]
        console.line(
            f"{constraint['name']} stands where point.max_loss={limit:g} is certified, not at that rejection rate"
        )
    for sentence in verdict.get("said") or [verdict["headline"]]:
        console.line(sentence)
    if verdict["drafting"] is not None:
        console.line(verdict["drafting"]["text"])
    console.path("report", folder / "report.html")
    console.path("TensorBoard", folder)
