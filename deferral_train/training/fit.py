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

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.training.checkpoint import load_checkpoint, read_checkpoint
from deferral_train.training.config import FitConfig, make_head, plain_settings
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.divergence import DivergedError
from deferral_train.training.flags import check_trainer_flags, lightning_errors
from deferral_train.training.log import LogOften, OneCurve, curve_logger, log_named
from deferral_train.training.metadata import evaluation_metadata, training_metadata
from deferral_train.training.module import HEADLINE, DeferralModule
from deferral_train.training.preparation import fit_recalibration
from deferral_train.training.resuming import made_from, take_up
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


def fit(config: FitConfig, out_dir: str | Path, *, resume: bool = True) -> FitResult:
    """Fit a head; everything is checked before training starts.

    Args:
        config: settings.
        out_dir: gets ``checkpoints/``, ``log/`` (TensorBoard), ``fit.json`` (settings, metrics, provenance) and
            ``made_from.json`` (settings and contents that decide the weights).
        resume: continue from ``checkpoints/last.ckpt`` where it exists and was made from the same settings, traces and
            initial weights; False starts over.

    Raises:
        InputError: bad settings or traces, by name; a folder that holds a fit of others.
    """
    out = Path(out_dir)
    with provenance.one_writer(out, "fit"):
        return _fit(config, out, resume)


def _fit(config: FitConfig, out: Path, resume: bool) -> FitResult:
    with quiet_lightning():
        pl.seed_everything(config.seed, verbose=False)
    data = _data(config)
    head = make_head(config, data.traces["train"], data.matrix_width)
    source = made_from(plain_settings(config), data, head)
    take_up(out, source, resume)
    data.prepare(head)
    if config.head == "plug_in" or isinstance(head, SklearnHead):
        result = _closed_form(config, data, head)
    else:
        result = _train(config, data, head, out, provenance.hash_of(source), resume)
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
    config: FitConfig, data: TraceDataModule, head: DeferralHead, out: Path, source: str, resume: bool
) -> FitResult:
    """Train with Lightning; ``source`` is the hash of what decides the weights, which checkpoints carry."""
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
    module.made_from = source
    best = best_checkpoint(out)
    last = out / "checkpoints" / "last.ckpt"
    start = str(last) if resume and last.exists() else None
    logger = curve_logger(out, None if start is None else int(load_checkpoint(last)["global_step"]))
    check_trainer_flags({"precision": config.precision, "strategy": config.strategy})
    stop = early_stopping(config.patience)
    with quiet_lightning(), log_named(out), lightning_errors():
        trainer = make_trainer(
            config, logger, [best, stop, KeepLast(last), OneCurve(out, start is not None), LogOften()]
        )
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
    kept = last.with_name("best.ckpt")  # whatever place a checkpoint of a folder that was moved remembers
    if not kept.is_file():
        raise InputError(f"{out}: the best checkpoint, {kept}, is gone; resume=False or --fresh starts over")
    head, scalars = read_checkpoint(kept)
    return FitResult(head, kept, scalars, Path(logger.log_dir), trainer.current_epoch)


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
    """Keeps ``checkpoints/best.ckpt`` by val/regret, and ``last.ckpt`` beside it."""
    return ModelCheckpoint(
        out / "checkpoints",
        filename="best",
        monitor=HEADLINE,
        save_last=True,
        enable_version_counter=False,
    )


def early_stopping(patience: int) -> EarlyStopping:
    """Stops after ``patience`` validations without a better val/regret; asked only where there was a validation."""
    return EarlyStopping(HEADLINE, patience=patience, check_on_train_epoch_end=False)


class KeepLast(Callback):
    """Writes ``last.ckpt`` when training is broken off, and leaves ``best.ckpt`` what it is.

    ModelCheckpoint's own ``save_on_exception`` would write the weights of that moment over the best ones. Weights that
    went wrong are not kept: the file then stays that of the last validation.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        begun = trainer.global_step > 0 and not trainer.sanity_checking
        if begun and trainer.world_size == 1 and not isinstance(exception, DivergedError):
            trainer.save_checkpoint(self.path)


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
