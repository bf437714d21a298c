"""Resuming a fit: a checkpoint continues only the training that it was written by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.training.checkpoint import load_checkpoint
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.module import DeferralModule
from deferral_train.training.resuming import traces_keys, training_settings

LIGHTNING = (
    "epoch",
    "global_step",
    "loops",
    "optimizer_states",
    "lr_schedulers",
    "pytorch-lightning_version",
)
HEAD = ("deferral_head_type", "stage", "loss", "features", "widths", "body", "hidden", "recalibration")
FREE = frozenset({"figure_every", "pair_training"})  # decide no weight


def check_resumable(
    path: str | Path, module: DeferralModule, data: TraceDataModule, trainer: Mapping[str, Any]
) -> int:
    """Refuse a checkpoint that this fit cannot continue; returns the optimiser steps that it has taken.

    Lightning restores weights and optimiser from the file, so that a setting given anew would be recorded but not used.

    Args:
        trainer: flags of Lightning's Trainer.

    Raises:
        InputError: an absent or damaged file, another head, or other settings, by name.
    """
    checkpoint = load_checkpoint(path)
    if any(key not in checkpoint for key in LIGHTNING):
        raise InputError(
            f"ckpt_path={path}: holds weights alone; name checkpoints/last.ckpt of a fit to resume it"
        )
    now = module.head.stored_config()
    pairs = [
        (
            "model.head",
            {key: checkpoint["deferral_head"].get(key) for key in HEAD},
            {k: now.get(k) for k in HEAD},
        )
    ]
    pairs += [("model", checkpoint.get("hyper_parameters", {}), dict(module.hparams))]
    pairs += [("data", checkpoint.get("datamodule_hyper_parameters", {}), dict(data.hparams))]
    if "deferral_traces" not in checkpoint:
        raise InputError(
            f"ckpt_path={path}: does not record what its traces held (an earlier release); "
            "leave ckpt_path out to start anew"
        )
    pairs += [("contents of data", checkpoint["deferral_traces"], traces_keys(data))]
    pairs += [("trainer", checkpoint.get("deferral_trainer", {}), training_settings(trainer))]
    for section, before, after in pairs:
        _refuse_changes(path, section, before, after)
    return int(checkpoint["global_step"])


def _refuse_changes(
    path: str | Path, section: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    for key in before:
        if key in now and key not in FREE and _plain(before[key]) != _plain(now[key]):
            raise InputError(
                f"ckpt_path={path}: {section}.{key} was {_plain(before[key])} there and is {_plain(now[key])} here; "
                "give the same to resume, or leave ckpt_path out to start anew"
            )


def _plain(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)
