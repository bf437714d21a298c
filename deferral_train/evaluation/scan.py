"""One pass over trace rows: every rule at every dial value, summed per prompt.

Rows come in blocks of whole prompts; each block is read once and all rules are applied to it. What stays is
one number per statistic, setting and prompt, from which estimates and bootstrap redraws are made. N rows, S
settings of one rule, P prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deferral_train.decoding.settings import Settings
from deferral_train.evaluation.distributions import distribution_sums
from deferral_train.evaluation.families import Family
from deferral_train.evaluation.positions import Positions, PromptBlock
from deferral_train.evaluation.survival import expected_calls
from deferral_train.rules.base import Dial, PositionRule, Rule
from deferral_train.rules.learned import LearnedRule

# Per-prompt sums: deferred positions, expected rejections, the loss of the model that each position is left
# to, the loss of the emitted token, the regret at the rule's own price and the least priced loss it is
# measured from, the expected verifier calls.
SUMS = ("deferred", "rejected", "loss", "emitted_loss", "regret", "oracle_loss", "calls")


@dataclass(frozen=True)
class Oracle(PositionRule):
    """Decides by the truth itself: defer iff gap > alpha D_TV, equation (9). Not a rule that anyone can
    serve.

    With an exact truth it is the optimal rule; with one gold token per position it decides in hindsight.
    """

    name: ClassVar[str] = "oracle"
    dial_is_price: ClassVar[bool] = True
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=None, drafter=None, unbounded=True)
    alpha: float = 0.0


@dataclass
class FamilySums:
    """Sums of one rule over all rows.

    Attributes:
        sums: name in :data:`SUMS` to float32 [S, P]; a statistic without a meaning for the rule is absent.
        decisions: for a position rule, its deferrals as packed bits [S, ceil(n/8)] of each block; else None.
    """

    family: Family
    sums: dict[str, np.ndarray]
    decisions: list[np.ndarray | None]

    def total(self, name: str) -> np.ndarray:
        """Sum over prompts, float64 [S]."""
        return self.sums[name].sum(axis=1, dtype=np.float64)


@dataclass(frozen=True)
class Effects:
    """One rule on one block: sums over rows by prompt [S, P'], and packed decisions."""

    sums: dict[str, np.ndarray]
    decisions: np.ndarray | None


def effects(family: Family, block: PromptBlock, num_draft_tokens: int) -> Effects:
    """Apply one rule at all its dial values to one block."""
    if isinstance(family.rule, PositionRule):
        defer = decide(family, block)
        sums, rejection = _position_sums(family, block, defer)
        packed = np.packbits(defer, axis=1)
    else:
        sums, rejection = distribution_sums(family.settings, block)
        packed = None
    acceptance = np.ascontiguousarray(1 - rejection.T)
    sums["calls"] = expected_calls(acceptance, block.layout, num_draft_tokens).T
    return Effects(sums, packed)


def decide(family: Family, block: PromptBlock) -> np.ndarray:
    """Deferrals of a position rule, bool [S, n]. A head's gap is computed once for all its alphas."""
    rule = family.rule
    if isinstance(rule, Oracle):
        return block.losses.gap > _column(family.values) * block.tv
    if isinstance(rule, LearnedRule) and not callable(getattr(rule.head, "defer", None)):
        gap = rule.head.gap(block.summary).numpy()
        tv = rule.head.tv(block.summary).numpy() if rule.stage == "draft" else block.tv
        return gap > _column(family.values) * tv
    return np.stack([_deferral(setting, block) for setting in family.settings])


def _deferral(rule: Rule, block: PromptBlock) -> np.ndarray:
    if rule.is_lossless:
        return np.ones(len(block.tv), dtype=bool)
    assert isinstance(rule, PositionRule)
    return rule.defer(block.summary).numpy()


def _column(values: Sequence[float | None]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)[:, None]


def _position_sums(
    family: Family, block: PromptBlock, defer: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sums per prompt [S, P'], and the rejection probability r * D_TV (Lemma 3) [S, n]."""
    losses, by_prompt = block.losses, block.layout.sums
    weight = defer.astype(np.float32)
    rejection = weight * block.tv
    sums = {
        "deferred": by_prompt(weight),
        "rejected": by_prompt(rejection),
        "loss": by_prompt(losses.drafter) - by_prompt(weight * losses.gap),
    }
    if losses.emitted_drafter is not None and losses.emitted_gap is not None:
        gained = by_prompt(weight * losses.emitted_gap)
        sums["emitted_loss"] = by_prompt(losses.emitted_drafter) - gained
    if family.rule.dial_is_price:
        net = losses.gap - _column(family.values) * block.tv
        sums["regret"] = by_prompt(np.abs(net) * (defer != (net > 0)))
        sums["oracle_loss"] = by_prompt(losses.drafter) - by_prompt(np.maximum(net, 0))
    return sums, rejection


def scan(
    families: Sequence[Family],
    positions: Positions,
    *,
    num_draft_tokens: int = Settings.num_draft_tokens,
    workers: int | None = None,
) -> list[FamilySums]:
    """Apply every family to every row, once.

    Args:
        positions: rows with the fields that the families need.
        num_draft_tokens: block size for the expected verifier calls.
        workers: threads; default the number of cores, at most 4.
    """
    results = [FamilySums(family, {}, []) for family in families]

    def work(prompts: slice) -> tuple[slice, list[Effects]]:
        block = positions.block(prompts)
        return prompts, [effects(family, block, num_draft_tokens) for family in families]

    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 4)) as pool:
        for prompts, outcomes in pool.map(work, positions.spans()):
            for result, outcome in zip(results, outcomes):
                _store(result, outcome, prompts, positions.prompts)
    return results


def _store(result: FamilySums, effects: Effects, prompts: slice, count: int) -> None:
    result.decisions.append(effects.decisions)
    for name, values in effects.sums.items():
        if name not in result.sums:
            result.sums[name] = np.zeros((len(values), count), dtype=np.float32)
        result.sums[name][:, prompts] = values
