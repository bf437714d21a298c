"""Lightning checkpoints of a fit: read safely, as a head and the scalars it was saved with."""

from __future__ import annotations

import pickle  # for the name of what torch.load raises; nothing is unpickled here
from pathlib import Path

import torch

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.config import head_from_config
from deferral_train.training.metadata import evaluation_metadata


def read_checkpoint(path: str | Path) -> tuple[DeferralHead, dict[str, float]]:
    """Head of a Lightning checkpoint, read with ``weights_only=True``, and the scalars logged when it was
    saved.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, state = checkpoint["deferral_head"], checkpoint["state_dict"]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a checkpoint of deferral-train fit") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError):
        raise InputError(
            f"{path} is no checkpoint of deferral-train fit; give its checkpoints/best.ckpt"
        ) from None
    head = head_from_config(config)
    prefix = "head."
    try:
        head.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    except RuntimeError:
        raise InputError(f"{path}: its weights do not fit the head that it describes; fit it again") from None
    scalars = {k: float(v) for k, v in checkpoint.get("deferral_scalars", {}).items()}
    head.metadata = {**head.metadata, **evaluation_metadata(scalars)}
    return head.eval(), scalars
