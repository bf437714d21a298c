"""Flags of Lightning's Trainer: each is handed on, or refused by name where a fit of a head cannot keep its promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from deferral_train.errors import InputError

# Lightning does what they say, with this module, loader and checkpoint as with any other.
HONOURED = frozenset(
    {
        *("accelerator", "devices", "num_nodes", "logger", "callbacks", "fast_dev_run", "min_epochs"),
        *("min_steps", "max_time", "overfit_batches", "val_check_interval", "check_val_every_n_epoch"),
        *("num_sanity_val_steps", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),
        *(
            "accumulate_grad_batches",
            "gradient_clip_val",
            "gradient_clip_algorithm",
            "deterministic",
            "benchmark",
        ),
        *("inference_mode", "profiler", "detect_anomaly", "plugins", "sync_batchnorm"),
        *("reload_dataloaders_every_n_epochs", "enable_autolog_hparams"),
    }
)


def _is_zero(value: Any) -> bool:
    return value is not None and value is not False and value == 0


def _is_sharded(value: Any) -> bool:
    kind = value.get("class_path", "") if isinstance(value, Mapping) else value
    name = kind if isinstance(kind, str) else type(kind).__name__
    return any(
        part in name.lower() for part in ("fsdp", "deepspeed", "model_parallel", "modelparallel", "xla")
    )


PRECISIONS = ("32-true", "32", "16-mixed", "16", "bf16-mixed", "bf16", "None")

# Parameter -> (which of its values are refused, why and what to do instead).
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "strategy": (_is_sharded, "a head fits on one device and its checkpoint is one file; use auto or ddp"),
    "precision": (
        lambda value: str(value) not in PRECISIONS,
        "heads are stored and served in 32 bit; use 32-true, bf16-mixed or 16-mixed",
    ),
    "barebones": (bool, "it measures Lightning itself and keeps neither checkpoint nor log; leave it out"),
    "enable_checkpointing": (
        lambda value: value is False,
        "the fitted head is read from the best checkpoint; leave it out",
    ),
    "limit_val_batches": (_is_zero, "the best checkpoint is chosen by val/regret; give 1 or more batches"),
    "limit_train_batches": (_is_zero, "nothing would be trained; give 1 or more batches"),
    "max_epochs": (_is_zero, "nothing would be trained; give 1 or more epochs"),
    "max_steps": (_is_zero, "nothing would be trained; give 1 or more steps"),
    "limit_test_batches": (
        lambda value: value is not None,
        "fit tests nothing; use deferral-train evaluate on the test traces",
    ),
    "limit_predict_batches": (lambda value: value is not None, "fit predicts nothing; leave it out"),
    "use_distributed_sampler": (bool, "the loader shares rows among processes itself; leave it out"),
    "default_root_dir": (lambda value: value is not None, "the folder of a fit is --out; use that"),
    "model_registry": (
        lambda value: value is not None,
        "heads are uploaded with deferral-train export --push_to_hub; leave it out",
    ),
}


def check_trainer_flags(given: Mapping[str, Any]) -> None:
    """Refuse values of Trainer parameters that a fit cannot honour.

    Raises:
        InputError: names the flag, the value and the remedy.
    """
    for name, (is_refused, reason) in REFUSED.items():
        if name in given and is_refused(given[name]):
            raise InputError(f"trainer.{name}={given[name]}: {reason}")


@contextmanager
def lightning_errors(part: str = "trainer") -> Iterator[None]:
    """Context in which Lightning's errors on flags that do not fit become an InputError of one line.

    Its own class of error, and plain ones that it raises itself, or the parser of its flags, or what opens addresses
    for it; an error from anywhere else is passed on.

    Args:
        part: what the line begins with.
    """
    try:
        yield
    except InputError:
        raise
    except MisconfigurationException as error:
        raise InputError(f"{part}: {error}") from error
    except (ValueError, TypeError, RuntimeError, ImportError, NotImplementedError) as error:
        if not _raised_by_lightning(error):
            raise
        raise InputError(f"{part}: {error}") from error


def _raised_by_lightning(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in ("pytorch_lightning", "lightning_fabric", "jsonargparse", "fsspec")
