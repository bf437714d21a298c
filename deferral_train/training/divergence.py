"""A fit that goes wrong says so: numbers that are not finite end it with one line, and reach no checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError


class DivergedError(InputError):
    """Training met a loss, weights or scores that are not finite."""


def refuse_loss(trainer: Any, loss: Tensor, lr: float) -> None:
    """Raise DivergedError where this step's loss is not finite on any process."""
    value = float(loss.detach())
    if _anywhere(trainer, not math.isfinite(value)):
        raise _diverged(trainer, f"the loss is {value:g}", lr)


def refuse_scores(trainer: Any, scalars: Mapping[str, float], lr: float) -> None:
    """Raise DivergedError where the scores of a validation, which every process knows, are not finite."""
    if not math.isfinite(scalars["regret"]):
        rows = scalars.get("not_finite", 0)
        raise _diverged(
            trainer,
            f"val/regret is {scalars['regret']:g}, the head's output not finite in {rows:.0f} rows",
            lr,
        )


def refuse_weights(trainer: Any, weights: Mapping[str, Tensor], lr: float) -> None:
    """Raise DivergedError where weights that a checkpoint would hold are not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _diverged(trainer, f"weight {name} is not finite", lr)


def _anywhere(trainer: Any, wrong: bool) -> bool:
    """One process that stopped alone would leave the others waiting for it."""
    return trainer.strategy.reduce_boolean_decision(wrong, all=False) if trainer.world_size > 1 else wrong


def _diverged(trainer: Any, wrong: str, lr: float) -> DivergedError:
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    kept = "no checkpoint was written before it"
    if best and Path(best).exists():
        kept = f"the best checkpoint before it is kept: {best}"
        score = trainer.checkpoint_callback.best_model_score
        kept += f" (val/regret {float(score):.6f})" if score is not None else ""
    return DivergedError(
        f"training diverged at step {trainer.global_step + 1} of epoch {trainer.current_epoch}: {wrong} at lr={lr:g}; "
        f"use a lower lr, or clip gradients (--trainer.gradient_clip_val 1); {kept}"
    )
