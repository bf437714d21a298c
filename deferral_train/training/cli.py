"""LightningCLI for heads: ``--model.head.class_path GapHead --data.train FOLDER --trainer.max_epochs 20``."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.module import HEADLINE, DeferralModule


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
        """Log, checkpoints and early stopping live under ``--out``, besides callbacks of the config."""
        out = Path(self.config["out"])
        changes.setdefault(
            "logger", TensorBoardLogger(str(out), name="log", version="", default_hp_metric=False)
        )
        trainer: Any = super().instantiate_trainer(**changes)
        best = ModelCheckpoint(
            out / "checkpoints",
            filename="best",
            monitor=HEADLINE,
            save_last=True,
            enable_version_counter=False,
        )
        stop = EarlyStopping(HEADLINE, patience=self.config["patience"])
        trainer.callbacks = [*(c for c in trainer.callbacks if type(c) is not ModelCheckpoint), stop, best]
        return trainer


def main(words: Sequence[str]) -> int:
    """Parse, train, name the checkpoint. Bad settings raise InputError with one line."""
    cli = _parsed(words)
    out = Path(cli.config["out"])
    provenance.write_json(
        out / "fit.provenance.json", provenance.collect({"seed": cli.config["data"]["seed"]})
    )
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config["ckpt_path"], weights_only=True)
    best = out / "checkpoints" / "best.ckpt"
    scores = cli.model.scalars
    print(f"val/regret {scores.get('regret', float('nan')):.6f} (last epoch); best checkpoint: {best}")
    print(f"export it with: deferral-train export --checkpoint {best} --out FOLDER")
    return 0


def _parsed(words: Sequence[str]) -> FitCLI:
    """The CLI with everything built; the parser's own usage text is reduced to its one line of error."""
    asked_for_help = any(
        word in ("-h", "--help", "--print_config") or word.endswith(".help") for word in words
    )
    spoken = io.StringIO()
    with (
        warnings.catch_warnings(),
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
            raise InputError(reason or "bad flags; deferral-train fit --help lists them") from None
