"""Export: a fitted head as a folder, with its operating point and what it costs here."""

from __future__ import annotations

from pathlib import Path

from deferral_train.errors import InputError
from deferral_train.heads.artifact import save_head
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.config import MAX_ALPHA
from deferral_train.heads.cost import measure_cost
from deferral_train.heads.judge import JudgeHead


def export_head(
    head: DeferralHead, folder: str | Path, alpha: float | None = None, threshold: float | None = None
) -> Path:
    """Write config.json, model.safetensors and README.md with the head's measured cost.

    Args:
        head: what to write; its metadata gains the cost, and the operating point where one is given.
        folder: where to.
        alpha: operating point; a certificate, which was of another one, is dropped. None keeps both.
        threshold: the same for a judge head, 0 to 1.

    Raises:
        InputError: alpha or threshold out of range, or for another head; alpha for a judge head.
    """
    judges = isinstance(head, JudgeHead)
    if (alpha if judges else threshold) is not None:
        dial, other = ("threshold", "alpha") if judges else ("alpha", "threshold")
        raise InputError(f"{other}: the dial of a {head.head_type} head is {dial}; give that")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"threshold is {threshold}; give a number from 0 to 1")
    if alpha is not None and not abs(alpha) <= MAX_ALPHA:
        raise InputError(f"alpha is {alpha:g}; give a number up to {MAX_ALPHA:g} in size")
    given = {"alpha": alpha, "threshold": threshold}
    point = {name: float(value) for name, value in given.items() if value is not None}
    if point:
        kept = {name: value for name, value in head.metadata.items() if name != "certificate"}
        head.metadata = kept | point
    head.metadata = {**head.metadata, "cost": measure_cost(head)}
    return save_head(head, folder)
