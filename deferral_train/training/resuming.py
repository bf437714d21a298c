"""Taking up a fit: only where settings, traces and initial weights are those that its checkpoint was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.fingerprint import weights_key
from deferral_train.traces import Traces
from deferral_train.training.checkpoint import load_checkpoint
from deferral_train.training.datamodule import TraceDataModule

RECORD = "made_from.json"
CHECKPOINTS = "checkpoints"
# Do not change the weights beyond rounding, or are told by content rather than by place.
FREE = frozenset({"train", "val", "accelerator", "devices", "strategy", "figure_every", "pair_training"})


def traces_key(traces: Traces) -> str:
    """Content of traces: the rows of which prompts, by the checksums of their shards."""
    shards = [[record.id, record.rows, record.sha256, dict(record.columns)] for record in traces.records]
    return provenance.hash_of([shards, list(traces.prompt_ids), len(traces)])


def traces_keys(data: TraceDataModule) -> dict[str, Any]:
    """Content of the traces that a fit learns from and is chosen on."""
    keys: dict[str, Any] = {name: traces_key(data.traces[name]) for name in ("train", "val")}
    return keys | {"further": [traces_key(traces) for traces in data.further]}


def training_settings(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of Lightning's Trainer that change the weights of a run which goes on, as JSON-like values.

    Args:
        trainer: attributes of a Trainer, or its flags as they were given.
    """
    values: dict[str, Any] = {
        "accumulate_grad_batches": 1,
        "limit_train_batches": 1.0,
        "overfit_batches": 0.0,
    }
    values |= {"gradient_clip_val": None, "gradient_clip_algorithm": None, "precision": "32-true"}
    found = {
        name: trainer.get(name) if trainer.get(name) is not None else value for name, value in values.items()
    }
    found["gradient_clip_val"] = found["gradient_clip_val"] or None
    algorithm = found["gradient_clip_algorithm"] or "norm"
    found["gradient_clip_algorithm"] = (
        str(getattr(algorithm, "value", algorithm)) if found["gradient_clip_val"] else None
    )
    precision = str(found["precision"])
    found["precision"] = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}.get(
        precision, precision
    )
    return found


def found_here(state: dict[str, Any] | None, folder: str | Path | None) -> None:
    """Let a ModelCheckpoint's state name the files of ``folder``, where its best one lies: a folder that was moved or
    copied goes on with its own best score, and reads nothing of the place that it came from.
    """
    best = "" if state is None else str(state.get("best_model_path") or "")
    if state is None or folder is None or not best or not (Path(folder) / Path(best).name).is_file():
        return

    def here(path: Any) -> str:
        return str(Path(folder) / Path(str(path)).name) if path else ""

    state["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = here(state.get(name))
    state["best_k_models"] = {here(path): score for path, score in (state.get("best_k_models") or {}).items()}


def made_from(settings: Mapping[str, Any], data: TraceDataModule, head: DeferralHead) -> dict[str, Any]:
    """Everything that decides the fitted weights, as JSON-like values.

    Args:
        settings: of the fit.
        data: with its traces; head: untrained, or with the weights that training starts from.
    """
    found = {
        "settings": {name: value for name, value in settings.items() if name not in FREE},
        "traces": traces_keys(data),
        "features": head.config,
        "initial": weights_key(head),
    }
    return dict(provenance.record_of(found))


def take_up(out: Path, now: Mapping[str, Any], resume: bool) -> None:
    """Refuse checkpoints that were made from something else, or remove them; then note what is made now.

    Args:
        out: folder of the fit.
        resume: False removes the checkpoints and the log that lie there.

    Raises:
        InputError: with ``resume``, a checkpoint of other settings or inputs; names what changed.
    """
    if not provenance.is_first_process():
        return
    checkpoints = sorted((out / CHECKPOINTS).glob("*.ckpt")) if (out / CHECKPOINTS).is_dir() else []
    if checkpoints and resume:
        remedy = "resume=False or --fresh starts over, another folder keeps both"
        provenance.refuse_reuse(out, provenance.read_object(out / RECORD, remedy), now, remedy)
        for path in checkpoints:
            if load_checkpoint(path).get("deferral_made_from") not in (None, provenance.hash_of(now)):
                raise InputError(
                    f"{path} was written by another fit than the one recorded in {out / RECORD}; {remedy}"
                )
        return
    for path in (*checkpoints, *(out / "log").glob("events.out.tfevents.*")):
        path.unlink()
    provenance.write_json(out / RECORD, now)
