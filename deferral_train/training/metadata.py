"""The record of its training that a fitted head carries: pair, prefixes, rows, settings, versions, validation
scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deferral_train import provenance

if TYPE_CHECKING:  # export reads checkpoints through this module and needs no Lightning
    from deferral_train.training.datamodule import TraceDataModule

REPORTED = ("regret", "excess_over_opt", "excess_over_plug_in", "hindsight_excess", "auroc", "gap_ece")


def training_metadata(data: TraceDataModule, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parts ``pair`` and ``training`` of a head's metadata."""
    traces = data.traces["train"]
    parts = [traces, *data.further]
    return {
        "pair": dict(traces.manifest.pair),
        "training": {
            "prefixes": " + ".join(part.manifest.prefixes for part in parts),
            "rows": sum(map(len, parts)),
            "prompts": len({name for part in parts for name in part.prompt_ids}),
            "truth": data.truth,
            **({"labels": dict(traces.manifest.labels)} if traces.manifest.labels else {}),
            "temperature": traces.manifest.temperature if data.temperature is None else data.temperature,
            "settings": dict(settings),
            "versions": provenance.versions(),
        },
    }


def evaluation_metadata(scalars: Mapping[str, float]) -> dict[str, Any]:
    """The part ``evaluation``: the scalars that matter, rounded; what is not finite has no place in JSON."""
    kept = {name: round(scalars[name], 8) for name in REPORTED if math.isfinite(scalars.get(name, math.nan))}
    return {"evaluation": {"dataset": "validation traces", "metrics": kept}}
