"""The fit stage: every candidate head on the same traces, the best on validation kept; and its export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from deferral_train.errors import InputError
from deferral_train.heads.base import HEADS, SEQUENCE_LOSSES
from deferral_train.heads.bodies import BODIES
from deferral_train.heads.objectives import OBJECTIVES
from deferral_train.heads.recalibration import KINDS as RECALIBRATIONS
from deferral_train.rules.risks import LOSSES
from deferral_train.traces import Traces
from deferral_train.training.config import FitConfig, make_head
from deferral_train.training.datamodule import check_alphas
from deferral_train.training.fit import FitResult, fit
from deferral_train.training.module import OPTIMIZERS, SCHEDULES
from deferral_train.training.ridge import RIDGE
from deferral_train.training.sklearn_heads import KINDS as SKLEARN

# Lower is better, and comparable between heads of one loss: the excess over OPT at every alpha of the grid.
CRITERION = "regret"
BEST = "fit/best"
LEARNED = "learned"  # what the head's rule is called in a run
CHOICES: dict[str, Sequence[str]] = {
    "head": (*HEADS, *SKLEARN),
    "stage": ("verify", "draft"),
    "loss": (*LOSSES, *SEQUENCE_LOSSES),
    "body": BODIES,
    "recalibration": RECALIBRATIONS,
    "objective": ("auto", RIDGE, *OBJECTIVES),
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
TRUTHS = ("reference", "verifier", "teacher", "exact", "acceptance", "sequence")
# As far as building an untrained head asks traces: every hidden state is there.
_ANY_TRACES: Any = SimpleNamespace(
    manifest=SimpleNamespace(
        hidden={"drafter": 8, "verifier": 8},
        layout=SimpleNamespace(judged=8),
        pair={"vocab_size": 8},
        temperature=0.0,
    )
)
# Smallest and largest value of a setting, or of each of several.
RANGES: dict[str, tuple[float, float]] = {
    "hidden": (1, 65536),
    "lr": (1e-12, 1e6),
    "weight_decay": (0, 1e6),
    "val_fraction": (1e-6, 1 - 1e-6),
    "batch_size": (1, 1 << 30),
    "epochs": (1, 1_000_000),
    "patience": (0, 1_000_000),
    "devices": (1, 4096),
    "figure_every": (0, 1_000_000),
    "temperature": (0, 1e6),
    "alphas": (-1e6, 1e6),
}


def fit_candidates(
    candidates: Mapping[str, Mapping[str, Any]], train: Traces, validation: Traces, run: Path, seed: int
) -> dict[str, Any]:
    """Fit all, save the one with the least ``val/regret``; returns metrics by candidate.

    Raises:
        InputError: a candidate with an unknown setting, named.
    """
    configs = {
        name: candidate_config(name, settings, seed, train, validation)
        for name, settings in candidates.items()
    }
    results = {name: fit(config, run / "fit" / name) for name, config in configs.items()}
    best = min(results, key=lambda name: results[name].metrics[CRITERION])
    results[best].head.save_pretrained(run / BEST)
    return {
        "best": best,
        "candidates": {name: _describe(result) for name, result in results.items()},
    }


def candidate_config(
    name: str, settings: Mapping[str, Any], seed: int, train: Any = None, validation: Any = None
) -> FitConfig:
    """The settings of one candidate, with every value checked; traces may be given later.

    Raises:
        InputError: an unknown setting, or a value of another type or out of range, as ``heads.candidates.NAME.FIELD``.
    """
    where = f"heads.candidates.{name}"
    if not isinstance(settings, Mapping):
        raise InputError(f"{where}: {settings!r} is no set of fields; write them as {{head: gap, lr: 0.003}}")
    kinds = {
        key: kind for key, kind in get_type_hints(FitConfig).items() if key not in ("train", "val", "seed")
    }
    unknown = sorted(set(settings) - set(kinds))
    if unknown:
        raise InputError(f"{where}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(kinds))}")
    for key, value in settings.items():
        if not fits(value, kinds[key]):
            raise InputError(f"{where}.{key}: {value!r} is no {_kind_text(kinds[key])}; give one")
        choices = CHOICES.get(key)
        if choices is not None and value not in choices:
            raise InputError(f"{where}.{key}: {value!r} is unknown; use {', '.join(choices)}")
        low, high = RANGES.get(key, (None, None))
        numbers = value if isinstance(value, list | tuple) else [value]
        if value is not None and low is not None and not all(low <= number <= high for number in numbers):
            raise InputError(f"{where}.{key}: {value!r} is out of range; give {low:g} to {high:g}")
    truth = settings.get("truth", "reference")
    if truth not in TRUTHS and not truth.startswith(("judge:", "sequence:")):
        raise InputError(f"{where}.truth: {truth!r} is unknown; use {', '.join(TRUTHS)} or judge:tau=X")
    try:
        config = FitConfig(train=train, val=validation, seed=seed, **settings)
        check_alphas(config.alphas)
        make_head(config, _ANY_TRACES)
        return config
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def fits(value: Any, kind: Any) -> bool:
    """True where a value from YAML is of the annotated type; whole numbers pass for floats, switches for neither."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def _kind_text(kind: Any) -> str:
    words = {
        int: "whole number",
        float: "finite number",
        str: "text",
        bool: "true or false",
        NoneType: "null",
    }
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_kind_text(part) for part in get_args(kind))
    if get_origin(kind) is not None:
        return f"list of {_kind_text(get_args(kind)[0])}s, such as [16]"
    return words.get(kind, str(kind))


def _describe(result: FitResult) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in result.head.parameters())
    scalars = {name: value for name, value in result.metrics.items() if "/" not in name and value == value}
    return {"parameters": parameters, "epochs": result.epochs, "metrics": scalars}
