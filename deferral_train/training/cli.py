"""LightningCLI for heads: ``--model.head.class_path GapHead --data.train FOLDER --trainer.max_epochs 20``."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.heads.own import check_own_class, class_name, find_modules_here
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.fit import best_checkpoint, early_stopping
from deferral_train.training.flags import check_trainer_flags, lightning_errors
from deferral_train.training.log import LogOften, OneCurve, curve_logger, log_named, silence_advertisements
from deferral_train.training.module import DeferralModule
from deferral_train.training.resume import check_resumable

NEEDED = (
    "fit needs traces to learn from (--data.train FOLDER, written by deferral-train collect) and columns to read "
    "(--model.head.init_args.features), or a file that names them: --config configs/fit/gap.yaml --data.train FOLDER"
)


class FitCLI(LightningCLI):
    """LightningCLI whose defaults are those of :func:`deferral_train.training.fit.fit`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", default="runs/fit", help="folder for checkpoints, log, config.yaml")
        parser.add_argument("--ckpt_path", default=None, help="checkpoint to resume from")
        parser.add_argument("--patience", default=10, type=int, help="epochs without a better val/regret")
        parser.link_arguments("data.seed", "model.seed")
        parser.set_defaults(
            {
                "trainer.accelerator": "auto",
                "trainer.max_epochs": 30,
                "trainer.deterministic": True,
                "trainer.num_sanity_val_steps": 0,
                "trainer.use_distributed_sampler": False,
                "trainer.enable_model_summary": False,
                "model.head": {"class_path": "deferral_train.heads.GapHead"},
            }
        )

    def instantiate_trainer(self, **changes: Any) -> Trainer:
        """Log, checkpoints and early stopping live under ``--out``, besides loggers and callbacks of the config."""
        given = self._get(self.config_init, "trainer")
        check_trainer_flags(given)
        check_own_class(self.model.head)
        if self.config["patience"] < 0:
            raise InputError(f"patience={self.config['patience']}: give 0 or more epochs")
        out, ckpt_path = Path(self.config["out"]), self.config["ckpt_path"]
        resumed_at = None
        if ckpt_path is not None:
            resumed_at = check_resumable(ckpt_path, self.model, self.datamodule, given)
        if given["logger"] is None or given["logger"] is True:
            changes.setdefault("logger", curve_logger(out, resumed_at))
        self.best = best_checkpoint(out)
        own: list[Callback] = [early_stopping(self.config["patience"])]
        if not given["fast_dev_run"]:  # a trial keeps nothing and leaves what is there
            own += [self.best]
            own += [OneCurve(out, resumed_at is not None)] if "logger" in changes else []
        own += [LogOften()] if given["log_every_n_steps"] is None else []
        theirs = given["callbacks"] or []
        changes["callbacks"] = [*(theirs if isinstance(theirs, list) else [theirs]), *own]
        return super().instantiate_trainer(default_root_dir=str(out), **changes)


def main(words: Sequence[str]) -> int:
    """Parse, train, name the checkpoint. Bad settings and a fit that diverges raise InputError with one line."""
    silence_advertisements()
    find_modules_here()
    cli = _parsed(words)
    out, trainer = Path(cli.config["out"]), cli.trainer
    try:
        with provenance.one_writer(out, "fit"), log_named(out), lightning_errors():
            seeds = {"seed": cli.config["data"]["seed"]}
            provenance.write_json(out / "fit.provenance.json", provenance.collect(seeds))
            trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config["ckpt_path"], weights_only=True)
            if trainer.global_step == 0:
                raise InputError("the run ended before its first step; give trainer.max_time more time")
            if not _only_tried(trainer) and not cli.best.best_model_path:
                _judge_at_the_end(cli)
    except SystemExit:
        if not trainer.interrupted:  # Lightning ends the process itself on the first Ctrl+C
            raise
        last = out / "checkpoints" / "last.ckpt"
        after = f"; continue with --ckpt_path {last}" if last.exists() else ""
        print(f"deferral-train fit: interrupted{after}", file=sys.stderr)
        return 130
    if _only_tried(trainer):
        print("fast_dev_run: training and validation ran; no checkpoint and no log are kept")
        return 0
    best, scores = cli.best.best_model_path, cli.model.scalars
    if scores:
        print(f"val/regret {scores['regret']:.6f} (last epoch); best checkpoint: {best}")
    else:  # resumed at its end
        print(f"nothing was left to train after step {trainer.global_step}; best checkpoint: {best}")
    print(f"export it with: {_export_command(cli, best)}")
    return 0


def _judge_at_the_end(cli: FitCLI) -> None:
    """Validate and keep the weights of a run that ended before its first validation: few steps, or little time."""
    cli.trainer.validate(cli.model, cli.datamodule, verbose=False, weights_only=True)
    cli.model.on_fit_end()
    best = Path(cli.config["out"]) / "checkpoints" / "best.ckpt"
    cli.trainer.save_checkpoint(best)
    cli.best.best_model_path = str(best)


def _export_command(cli: FitCLI, checkpoint: str) -> str:
    """The command that exports this fit's head; a class of the user's own must be named again."""
    own = class_name(cli.model.head)
    named = "" if own is None else f" --head-class {own}"
    return f"deferral-train export --checkpoint {checkpoint} --out FOLDER{named}"


def _parsed(words: Sequence[str]) -> FitCLI:
    """The CLI with everything built; the parser's own usage text is reduced to its one line of error."""
    asked_for_help = any(
        word in ("-h", "--help", "--print_config") or word.endswith(".help") for word in words
    )
    spoken = io.StringIO()
    with (
        warnings.catch_warnings(),
        lightning_errors("flags"),
        contextlib.nullcontext() if asked_for_help else contextlib.redirect_stderr(spoken),
    ):
        # The words are the command line's own, less the command: sys.argv holds nothing else to mistake them for.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        try:
            return FitCLI(
                DeferralModule,
                TraceDataModule,
                run=False,
                args=list(words),
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"prog": "deferral-train fit"},
            )
        except SystemExit as stop:
            if stop.code in (0, None):
                raise
            said = spoken.getvalue()
            # The parser names the key on one line, and value and remedy on those after it.
            reason = " ".join(said[said.rfind("error: ") :].removeprefix("error: ").split())
            if "required" in reason:  # the parser names places in a tree of classes
                reason = f"{NEEDED} ({reason})"
            raise InputError(reason or "bad flags; deferral-train fit --help lists them") from None


def _only_tried(trainer: Any) -> bool:
    """True under ``fast_dev_run``, an attribute that Lightning sets but does not declare."""
    return bool(getattr(trainer, "fast_dev_run", False))
