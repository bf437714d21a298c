"""DeferralModule: a head, an objective, an optimiser, and regret tracked while it learns."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.objectives import OBJECTIVES, objective_for
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.divergence import refuse_loss, refuse_scores, refuse_weights
from deferral_train.training.figures import draw
from deferral_train.training.loader import step_seed
from deferral_train.training.metadata import training_metadata
from deferral_train.training.preparation import prepare_head
from deferral_train.training.resuming import found_here, traces_keys, training_settings
from deferral_train.training.ridge import RIDGE, fit_ridge
from deferral_train.training.scoring import label_range
from deferral_train.training.tracking import Tracker, predict

OPTIMIZERS = ("adamw", "sgd", "rmsprop")
SCHEDULES = ("constant", "cosine", "linear")
HEADLINE = "val/regret"


class DeferralModule(pl.LightningModule):
    """Trains a head on a :class:`TraceDataModule`.

    Args:
        head: the head; its normalisation and recalibration are fitted on the fit split before the first step.
        objective: name in :data:`deferral_train.heads.objectives.OBJECTIVES`; auto is the head's own; ridge solves
            a linear gap head in closed form, its penalty chosen on the validation split.
        lr: peak learning rate.
        weight_decay: of adamw; coupled L2 for the others.
        optimizer: adamw, sgd or rmsprop.
        schedule: constant, cosine or linear decay to zero over the run.
        warmup_steps: steps over which the rate rises linearly.
        seed: of everything drawn while training (alpha); a function of the step, so that a resumed run
        repeats it. figure_every: epochs between figures in the log; 0 draws none.
    """

    def __init__(
        self,
        head: DeferralHead,
        objective: str = "auto",
        lr: float = 3e-3,
        weight_decay: float = 1e-4,
        optimizer: str = "adamw",
        schedule: str = "cosine",
        warmup_steps: int = 0,
        seed: int = 0,
        figure_every: int = 5,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS or schedule not in SCHEDULES:
            raise InputError(
                f"optimizer={optimizer!r}, schedule={schedule!r}: use one of {', '.join(OPTIMIZERS)} and "
                f"one of {', '.join(SCHEDULES)}"
            )
        self.save_hyperparameters(ignore=["head"])
        self.head = head
        self.objective = objective if objective == RIDGE else objective_for(head, objective)
        self.optimizer, self.schedule, self.warmup_steps = optimizer, schedule, warmup_steps
        self.lr, self.weight_decay, self.seed, self.figure_every = lr, weight_decay, seed, figure_every
        self.generator = torch.Generator()
        self.trackers = torch.nn.ModuleDict()
        self.scalars: dict[str, float] = {}  # of the latest validation
        self.made_from: str | None = (
            None  # hash of what decides the weights, where a caller keeps such a record
        )

    @property
    def data(self) -> TraceDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            prepare_head(self.head, self.data.traces["train"], self.data.tables["train"])
            if self.objective == RIDGE:
                warnings.filterwarnings("ignore", message=".*training_step. returned .None.*")  # as it should
                self.penalty = fit_ridge(self.head, self.data.tables["train"], self.data.tables["val"])
            settings = {**self.hparams, "objective": self.objective, "batch_size": self.data.batch_size}
            settings |= {"penalty": self.penalty} if self.objective == RIDGE else {}
            self.head.metadata = training_metadata(self.data, settings)
        for split in ("val", "test"):
            table = self.data.tables[split]
            limits = label_range(self.head.loss, table["z"])
            self.trackers[split] = Tracker(self.head, self.data.alphas, "exact" in table, limits)
        self.trackers.to(self.device)

    def on_fit_end(self) -> None:
        """Settings beside the final scores; at the start there is no score that would not mislead."""
        logger = self._tensorboard()
        if logger is not None and self.scalars:
            names = ("regret", "excess_over_opt", "excess_over_plug_in", "hindsight_excess")
            logger.log_hyperparams(self._facts(), {f"hp/{name}": self.scalars[name] for name in names})

    def _tensorboard(self) -> TensorBoardLogger | None:
        """The logger that takes figures, among any others."""
        return next((each for each in self.loggers if isinstance(each, TensorBoardLogger)), None)

    def _facts(self) -> dict[str, Any]:
        """Flat settings of head, data and training for the log's table of hyper-parameters."""
        facts = {f"head/{k}": v for k, v in self.head.config.items() if k != "schema"}  # its hash is there
        facts |= {f"data/{k}": v for k, v in self.data.hparams.items()}
        facts |= {**self.hparams, "objective": self.objective, "parameters": self.head.num_parameters}
        return {name: _flat(value) for name, value in facts.items()}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
        if self.objective == RIDGE:  # solved before the first step
            self.trainer.should_stop = True
            return None
        self.generator.manual_seed(step_seed(self.seed + 1, self.global_step * 4096 + self.global_rank))
        loss = OBJECTIVES[self.objective](self.head, batch, self.generator)
        refuse_loss(self.trainer, loss, self.lr)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        self._score("test", batch)

    def _score(self, split: str, batch: dict[str, Tensor]) -> None:
        tracker = self._tracker(split)
        alphas = torch.tensor(tracker.alphas, device=self.device)
        out = predict(self.head, batch, alphas)
        tracker.update(out, batch)
        if split == "val" and "gap" in out:
            self._last_gap = out["gap"]

    def _tracker(self, split: str) -> Tracker:
        tracker = self.trackers[split]
        assert isinstance(tracker, Tracker)
        return tracker

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        tracker = self._tracker(split)
        scalars = tracker.compute()
        if split == "val":  # before anything calls these scores the best
            refuse_scores(self.trainer, scalars, self.lr)
        if not self.trainer.sanity_checking:
            self.log_dict({f"{split}/{name}": value for name, value in scalars.items()}, rank_zero_only=False)
            self._draw(split, tracker, scalars)
            self.scalars = scalars if split == "val" else self.scalars
        tracker.reset()

    def _draw(self, split: str, tracker: Tracker, scalars: dict[str, float]) -> None:
        due = self.figure_every > 0 and self.current_epoch % self.figure_every == 0
        last = self.trainer.state.fn != "fit" or self.current_epoch + 1 == self.trainer.max_epochs
        logger = self._tensorboard()
        if logger is None or not self.figure_every or not (due or last):
            return
        if self.trainer.is_global_zero:
            for tag, figure in draw(tracker, scalars).items():
                logger.experiment.add_figure(f"{split}/{tag}", figure, self.global_step)
            if split == "val" and hasattr(self, "_last_gap"):
                logger.experiment.add_histogram("val/gap", self._last_gap, self.global_step)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.head.parameters() if p.requires_grad]
        if not parameters:
            raise InputError(f"a {self.head.head_type} head has nothing to train; use it without fit")
        classes = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
        optimizer = classes[self.optimizer](parameters, lr=self.lr, weight_decay=self.weight_decay)
        total = self.total_steps()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimiser steps of the whole run; without an end, more than any run takes.

        Counted here because Trainer.estimated_stepping_batches sets the loaders up before a checkpoint is
        restored, and the loader's place in the epoch would be lost.
        """
        trainer = self.trainer
        limit, batches = trainer.limit_train_batches, len(self.data.train_dataloader())
        batches = min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        steps = -(-batches // trainer.accumulate_grad_batches) * epochs
        bounds = [bound for bound in (steps, trainer.max_steps) if bound > 0]
        if not bounds and self.schedule != "constant":
            raise InputError(
                f"schedule={self.schedule!r} ends with the run, and max_epochs={epochs} sets no end; give "
                "trainer.max_epochs or trainer.max_steps, or use schedule constant"
            )
        return min(bounds, default=1 << 30)

    def _rate(self, step: int, total: int) -> float:
        """Factor of the peak rate after ``step`` of ``total`` steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = max(0.0, 1 - (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        cosine = 0.5 - 0.5 * math.cos(math.pi * left)
        return {"constant": 1.0, "linear": left, "cosine": cosine}[self.schedule]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = [each for each in self.trainer.callbacks if isinstance(each, ModelCheckpoint)]  # type: ignore[attr-defined]
        for callback in own:
            found_here(checkpoint.get("callbacks", {}).get(callback.state_key), callback.dirpath)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_weights(self.trainer, self.head.state_dict(), self.lr)
        checkpoint["deferral_head"] = self.head.stored_config()
        checkpoint["deferral_scalars"] = self.scalars
        checkpoint["deferral_traces"] = traces_keys(self.data)
        checkpoint["deferral_trainer"] = training_settings(
            vars(self.trainer) | {"precision": self.trainer.precision}
        )
        if self.made_from is not None:
            checkpoint["deferral_made_from"] = self.made_from


def _flat(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value) if isinstance(value, dict) or value is None else value
