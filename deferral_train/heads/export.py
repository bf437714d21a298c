"""Export: a fitted head as a folder, with its operating point and what it costs here."""

from __future__ import annotations

from pathlib import Path

from deferral_train.heads.artifact import save_head
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.cost import measure_cost


def export_head(head: DeferralHead, folder: str | Path, alpha: float | None = None) -> Path:
    """Write config.json, model.safetensors and README.md with the head's measured cost.

    Args:
        head: what to write; its metadata gains the cost, and the operating point where one is given.
        folder: where to.
        alpha: operating point; a certificate, which was of another one, is dropped. None keeps both.
    """
    if alpha is not None:
        kept = {name: value for name, value in head.metadata.items() if name != "certificate"}
        head.metadata = {**kept, "alpha": float(alpha)}
    head.metadata = {**head.metadata, "cost": measure_cost(head)}
    return save_head(head, folder)
