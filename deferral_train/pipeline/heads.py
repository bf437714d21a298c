"""The fit stage: every candidate head on the same traces, the best on validation kept; and its export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.traces import Traces
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import FitResult, fit

# Lower is better, and comparable between heads of one loss: the excess over OPT at every alpha of the grid.
CRITERION = "regret"
BEST = "fit/best"
LEARNED = "learned"  # what the head's rule is called in a run


def fit_candidates(
    candidates: Mapping[str, Mapping[str, Any]], train: Traces, validation: Traces, run: Path, seed: int
) -> dict[str, Any]:
    """Fit all, save the one with the least ``val/regret``; returns metrics by candidate.

    Raises:
        InputError: a candidate with an unknown setting, named.
    """
    configs = {
        name: _config(name, settings, train, validation, seed) for name, settings in candidates.items()
    }
    results = {name: fit(config, run / "fit" / name) for name, config in configs.items()}
    best = min(results, key=lambda name: results[name].metrics[CRITERION])
    results[best].head.save_pretrained(run / BEST)
    return {
        "best": best,
        "candidates": {name: _describe(result) for name, result in results.items()},
    }


def _config(
    name: str, settings: Mapping[str, Any], train: Traces, validation: Traces, seed: int
) -> FitConfig:
    known = {field.name for field in fields(FitConfig)} - {"train", "val", "seed"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InputError(
            f"heads.candidates.{name}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    return FitConfig(train=train, val=validation, seed=seed, **settings)


def _describe(result: FitResult) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in result.head.parameters())
    scalars = {name: value for name, value in result.metrics.items() if "/" not in name and value == value}
    return {"parameters": parameters, "epochs": result.epochs, "metrics": scalars}
