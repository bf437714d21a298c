"""Fit a head from Python: one call with plain settings, as the pipeline and the studies do it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from deferral_train import provenance
from deferral_train.heads.base import DeferralHead
from deferral_train.training.checkpoint import read_checkpoint
from deferral_train.training.config import FitConfig, make_head, plain_settings
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.metadata import evaluation_metadata, training_metadata
from deferral_train.training.module import HEADLINE, DeferralModule
from deferral_train.training.preparation import fit_recalibration
from deferral_train.training.ridge import RIDGE
from deferral_train.training.scoring import score
from deferral_train.training.sklearn_heads import SklearnHead


@dataclass(frozen=True)
class FitResult:
    """A fitted head and where its record lies.

    Attributes:
        head: best on val/regret, in evaluation mode.
        checkpoint: Lightning checkpoint it was read from; None for a head without trained weights.
        metrics: scalars of the best head on validation, by name (``val/...`` without the prefix).
        log_dir: TensorBoard folder.
        epochs: epochs run.
    """

    head: DeferralHead
    checkpoint: Path | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    log_dir: Path | None = None
    epochs: int = 0


def fit(
    config: FitConfig, out_dir: str | Path, *, resume: bool = True, initial: DeferralHead | None = None
) -> FitResult:
    """Fit a head; everything is checked before training starts.

    Args:
        config: settings.
        out_dir: gets ``checkpoints/``, ``log/`` (TensorBoard), ``fit.json`` (settings, metrics, provenance).
        resume: continue from ``checkpoints/last.ckpt`` where it exists.
        initial: start from this head's weights instead of fresh ones (refitting on new prefixes).

    Raises:
        InputError: bad settings or traces, by name.
    """
    out = Path(out_dir)
    with quiet_lightning():
        pl.seed_everything(config.seed, verbose=False)
    data = _data(config)
    head = make_head(config, data.traces["train"], data.matrix_width)
    if initial is not None and config.objective != RIDGE:
        head.load_state_dict(initial.state_dict())
    data.prepare(head)
    if config.head == "plug_in" or isinstance(head, SklearnHead):
        result = _closed_form(config, data, head)
    else:
        result = _train(config, data, head, out, resume)
    _record(config, data, result, out)
    return result


def _data(config: FitConfig) -> TraceDataModule:
    return TraceDataModule(
        train=config.train,
        val=config.val,
        val_fraction=config.val_fraction,
        truth=config.truth,
        temperature=config.temperature,
        alphas=config.alphas,
        batch_size=config.batch_size,
        seed=config.seed,
        pair_training=config.pair_training,
        verifier=config.verifier,
    )


def _train(
    config: FitConfig, data: TraceDataModule, head: DeferralHead, out: Path, resume: bool
) -> FitResult:
    module = DeferralModule(
        head,
        objective=config.objective,
        lr=config.lr,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
        schedule=config.schedule,
        seed=config.seed,
        figure_every=config.figure_every,
    )
    logger = TensorBoardLogger(str(out), name="log", version="", default_hp_metric=False)
    best = best_checkpoint(out)
    last = out / "checkpoints" / "last.ckpt"
    with quiet_lightning():
        trainer = make_trainer(config, logger, [best, EarlyStopping(HEADLINE, patience=config.patience)])
        start = str(last) if resume and last.exists() else None
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
    head, scalars = read_checkpoint(best.best_model_path)
    return FitResult(head, Path(best.best_model_path), scalars, Path(logger.log_dir), trainer.current_epoch)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's advice and hardware notes held back while a library call runs; warnings still pass."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def best_checkpoint(out: Path) -> ModelCheckpoint:
    """Keeps ``checkpoints/best.ckpt`` by val/regret, and ``last.ckpt``, also when training is broken off."""
    return ModelCheckpoint(
        out / "checkpoints",
        filename="best",
        monitor=HEADLINE,
        save_last=True,
        save_on_exception=True,
        enable_version_counter=False,
    )


def make_trainer(config: FitConfig, logger: Any, callbacks: list[Callback]) -> pl.Trainer:
    """Trainer of a config: quiet, deterministic, one validation per epoch."""
    return pl.Trainer(
        max_epochs=config.epochs,
        logger=logger,
        callbacks=callbacks,
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=config.strategy,
        precision=config.precision,  # type: ignore[arg-type]
        deterministic=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        use_distributed_sampler=False,
    )


def _closed_form(config: FitConfig, data: TraceDataModule, head: DeferralHead) -> FitResult:
    """Baselines that are fitted in one call, and scored as trained heads are."""
    if isinstance(head, SklearnHead):
        head.fit_table(data.tables["train"])
    else:
        fit_recalibration(head, data.traces["train"])
    scalars = score(head, data.tables["val"], data.alphas)
    settings = {"head": config.head, "recalibration": config.recalibration, "seed": config.seed}
    head.metadata = {**training_metadata(data, settings), **evaluation_metadata(scalars)}
    return FitResult(head.eval(), None, scalars)


def _record(config: FitConfig, data: TraceDataModule, result: FitResult, out: Path) -> None:
    record = {
        "config": plain_settings(config),
        "plug_in_chosen": dict(zip(map(str, data.alphas), data.plug_ins)),
        "epochs": result.epochs,
        "metrics": {k: v for k, v in result.metrics.items() if v == v},
        "provenance": provenance.collect({"seed": config.seed}),
    }
    provenance.write_json(out / "fit.json", record)
