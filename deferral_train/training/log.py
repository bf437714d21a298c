"""The log of a training run: one curve in one folder, as full after a dozen steps as after thousands."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger

NAME = "log"
POINTS = 50  # of train/loss that even a short run logs, where it has as many steps
SPARSEST = 50  # steps between two points of a long run


def curve_logger(out: Path, resumed_at: int | None = None) -> TensorBoardLogger:
    """TensorBoard log in ``out/log``.

    Args:
        out: folder of the fit.
        resumed_at: optimiser steps already taken by the checkpoint that is resumed: points that an interrupted run
            logged after it are dropped by whoever reads the log. None starts a new curve.
    """
    more: dict[str, Any] = {} if resumed_at is None else {"purge_step": resumed_at}
    return TensorBoardLogger(str(out), name=NAME, version="", default_hp_metric=False, **more)


@contextmanager
def log_named(out: Path) -> Iterator[None]:
    """Context in which an error of the disk bare of a file names ``out/log``: TensorBoard passes on no name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(out / NAME)) from error


class OneCurve(Callback):
    """Removes the log of an earlier run from the folder once a new run from scratch begins to train.

    Args:
        out: folder of the fit.
        resumed: the run continues from a checkpoint, and its log that of the run before.
    """

    def __init__(self, out: Path, resumed: bool) -> None:
        self.old = [] if resumed else sorted((out / NAME).glob("events.out.tfevents.*"))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            for file in self.old:
                file.unlink(missing_ok=True)


class LogOften(Callback):
    """Sets the steps between logged points from the length of the run: short runs log every step."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            trainer.log_every_n_steps = max(1, min(SPARSEST, pl_module.total_steps() // POINTS))  # type: ignore[attr-defined]


class _NoAdvertisement(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        return not ("Tip:" in text and "installing" in text)


def silence_advertisements() -> None:
    """Drop Lightning's tips to install other products; its notes about this run stay."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    if not any(isinstance(each, _NoAdvertisement) for each in logger.filters):
        logger.addFilter(_NoAdvertisement())
