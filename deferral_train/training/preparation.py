"""What a head learns in closed form before the first gradient step: recalibration, then normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.traces import Traces

BLOCK = 262_144


def prepare_head(head: DeferralHead, traces: Traces, table: dict[str, Tensor]) -> None:
    """Fit recalibration on gold tokens and normalisation on the raw columns of the fit split."""
    fit_recalibration(head, traces)
    head.fit_normalisation(blocks(table["x"]))


def blocks(x: Tensor) -> Iterator[Tensor]:
    """Rows of ``x`` in slices that fit a cache."""
    for start in range(0, len(x), BLOCK):
        yield x[start : start + BLOCK]


def fit_recalibration(head: DeferralHead, traces: Traces) -> None:
    """Map max q and max p to the share of gold tokens that each model's argmax hits; nothing to do for
    none.
    """
    if head.recalibration.kind == "none":
        return
    gold = torch.from_numpy(traces.column("gold").copy()).long()
    if bool((gold < 0).any()):
        raise InputError(
            f"recalibration={head.recalibration.kind!r} needs gold tokens; these traces have prefixes "
            f"{traces.manifest.prefixes!r} without them"
        )
    names = [f"{role}_{what}" for role in ("drafter", "verifier") for what in ("max", "argmax")]
    summary = traces.summary(names)
    pairs = [(summary[f"{role}_max"], gold == summary[f"{role}_argmax"]) for role in ("drafter", "verifier")]
    head.recalibration.fit(pairs[0], pairs[1] if head.stage == "verify" else None)
