"""Lightning checkpoints of a fit: read safely, as a head and the scalars it was saved with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deferral_train.errors import InputError
from deferral_train.heads.artifact import check_tensors
from deferral_train.heads.base import DeferralHead, head_from_config
from deferral_train.heads.folding import folded
from deferral_train.training.metadata import evaluation_metadata


def read_checkpoint(
    path: str | Path, cls: type[DeferralHead] | None = None
) -> tuple[DeferralHead, dict[str, float]]:
    """Head of a Lightning checkpoint, read with ``weights_only=True``, and the scalars logged when it was
    saved. A linear head that reads embeddings comes folded: with a table of one number per token.

    ``cls`` is a class of the caller's own, needed where the head is of one.
    """
    checkpoint = load_checkpoint(path)
    head = head_from_config(checkpoint["deferral_head"], cls)
    prefix = "head."
    tensors = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    check_tensors(Path(path), tensors, head.state_dict())
    head.load_state_dict(tensors)
    scalars = {k: float(v) for k, v in checkpoint.get("deferral_scalars", {}).items()}
    head.metadata = {**head.metadata, **evaluation_metadata(scalars)}
    return folded(head).eval(), scalars


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dictionary, with the parts that we read of the right kind.

    Raises:
        InputError: an absent file, or one that is damaged or no checkpoint of a fit.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a checkpoint of deferral-train fit") from None
    except Exception:  # what torch's reader raises on other bytes is not ours to list
        checkpoint = None
    if not (
        isinstance(checkpoint, dict)
        and isinstance(checkpoint.get("deferral_head"), dict)
        and _is_mapping(checkpoint.get("state_dict"), torch.Tensor)
        and _is_mapping(checkpoint.get("deferral_scalars", {}), (int, float))
    ):
        raise InputError(
            f"{path} is no checkpoint of deferral-train fit, or damaged; give its checkpoints/best.ckpt"
        )
    return checkpoint


def _is_mapping(value: Any, kinds: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(item, kinds) for key, item in value.items()
    )
