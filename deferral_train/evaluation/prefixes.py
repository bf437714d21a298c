"""Logged prefixes for the report's alpha slider: per token the gap estimates, D_TV, and the observed
losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deferral_train.evaluation.families import Family
from deferral_train.evaluation.positions import Positions, PromptBlock
from deferral_train.rules.learned import LearnedRule


def slider_prefixes(families: Sequence[Family], table: Positions, prompts: int = 20) -> dict[str, Any]:
    """The first ``prompts`` prompts, with every estimate of the gap that a rule decides by.

    The plug-in (max p - max q, OPT) is always there; verify-stage heads come first. A head that decides by
    itself, without a gap, has no place here.
    """
    block = table.block(slice(0, min(prompts, table.prompts)))
    estimates = {family.name: _gap(family, block) for family in families if _has_gap(family)}
    estimates["opt (plug-in)"] = (block.summary["verifier_max"] - block.summary["drafter_max"]).numpy()
    tokens = block.summary["token"].tolist()
    parts = []
    for number, (start, length) in enumerate(zip(block.layout.starts, block.layout.lengths)):
        rows = slice(int(start), int(start + length))
        parts.append(
            {
                "id": table.prompt_ids[number],
                "tokens": tokens[rows],
                "gap": {name: _rounded(values[rows]) for name, values in estimates.items()},
                "tv": _rounded(block.tv[rows]),
                "drafter_loss": _rounded(block.losses.drafter[rows]),
                "observed_gap": _rounded(block.losses.gap[rows]),
            }
        )
    chosen = next(
        (family.chosen for family in families if family.chosen is not None and _has_gap(family)), 0.1
    )
    return {
        "estimators": list(estimates),
        "alpha": {"low": -1.0, "high": 1.0, "start": chosen},
        "truth": table.truth,
        "loss": table.loss,
        "prompts": parts,
    }


def _has_gap(family: Family) -> bool:
    rule = family.rule
    if not isinstance(rule, LearnedRule) or rule.stage != "verify":
        return False
    return not callable(getattr(rule.head, "defer", None))


def _gap(family: Family, block: PromptBlock) -> np.ndarray:
    assert isinstance(family.rule, LearnedRule)
    return family.rule.head.gap(block.summary).numpy()


def _rounded(values: np.ndarray) -> list[float]:
    """Five digits; an infinite gap (inputs that are no numbers) becomes a large one, which defers as well."""
    return [round(float(value), 5) for value in np.nan_to_num(values, posinf=1e6, neginf=-1e6)]
