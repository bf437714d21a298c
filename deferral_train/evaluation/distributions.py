"""Deferral, rejection and loss of one rule on a block of rows, from logged candidates where a rule needs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deferral_train.evaluation.positions import PromptBlock
from deferral_train.rules.base import Rule
from deferral_train.rules.offline import deferral_rate, emitted_gold_risk, rejection_rate


def distribution_sums(
    settings: Sequence[Rule], block: PromptBlock
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sums per prompt [S, P'] and the rejection probability D_TV(q, pi) [S, n].

    ``candidate_bound`` sums the most by which the unlogged tail can change the rejection probability; it is absent
    for a rule that states no bound. The
    emitted token's loss needs a gold token; other truths do not say P(v) for every candidate.
    """
    by_prompt = block.layout.sums
    rejections = [
        rejection_rate(rule, block.summary, block.candidates, block.temperature) for rule in settings
    ]
    rejection = _stack([value for value, _ in rejections])
    sums = {"rejected": by_prompt(rejection)}
    bounds = _stack([bound for _, bound in rejections])
    if not np.isnan(bounds).any():
        sums["candidate_bound"] = by_prompt(bounds)
    deferred = [
        deferral_rate(rule, block.summary, block.candidates, block.temperature)[0] for rule in settings
    ]
    sums["deferred"] = by_prompt(_stack(deferred))
    if block.truth == "reference" and block.losses.emitted_drafter is not None:
        risks = [
            emitted_gold_risk(rule, block.summary, block.candidates, block.gold, block.temperature)[0]
            for rule in settings
        ]
        sums["emitted_loss"] = by_prompt(_stack(risks))
    return sums, rejection


def deferral_and_rejection(
    rule: Rule, block: PromptBlock, tails: Sequence[float] = (0.0,)
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, T] that a drafted token is deferred, and rejected, of any rule.

    Args:
        tails: T numbers in [-1, 1], where in their bounds from unlogged candidates to take them, 0 the middle; a rule
            that states no bound is taken as if it were exact.
    """
    arguments = (rule, block.summary, block.candidates, block.temperature)
    estimates = (deferral_rate(*arguments), rejection_rate(*arguments))
    deferral, rejection = (
        np.stack([(value + tail * bound.nan_to_num(0.0)).clamp(0.0, 1.0).numpy() for tail in tails], axis=1)
        for value, bound in estimates
    )
    return deferral, rejection


def _stack(rows: Sequence) -> np.ndarray:
    return np.stack([row.numpy() for row in rows]).astype(np.float32)
