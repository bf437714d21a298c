"""Fits a head's memory, recalibration and normalisation in closed form, before the first gradient step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.rules.summary import PREVIOUS_TOKENS
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


def fit_memory(head: DeferralHead, traces: Traces) -> None:
    """Count the gold tokens of the fit traces where a feature asks for it; before any table is made."""
    if head.inputs.memory is None:
        return
    summary = traces.summary(PREVIOUS_TOKENS)
    head.inputs.memory.fit(summary, gold_tokens(traces, "a memory feature"), head.inputs.orders)


def gold_tokens(traces: Traces, what: str) -> Tensor:
    """Gold tokens ``[N]``; InputError in the name of ``what`` where the prefixes have none."""
    gold = torch.from_numpy(traces.column("gold").copy()).long()
    if bool((gold < 0).any()):
        raise InputError(
            f"{what} needs gold tokens; these traces have prefixes {traces.manifest.prefixes!r} without them"
        )
    return gold


def fit_recalibration(head: DeferralHead, traces: Traces) -> None:
    """Map max q and max p to the share of gold tokens that each model's argmax hits; nothing to do for
    none.
    """
    if head.recalibration.kind == "none":
        return
    gold = gold_tokens(traces, f"recalibration={head.recalibration.kind!r}")
    names = [f"{role}_{what}" for role in ("drafter", "verifier") for what in ("max", "argmax")]
    summary = traces.summary(names)
    pairs = [(summary[f"{role}_max"], gold == summary[f"{role}_argmax"]) for role in ("drafter", "verifier")]
    head.recalibration.fit(pairs[0], pairs[1] if head.stage == "verify" else None)
