"""Disjoint parts of traces, by prompt: tokens of one prompt never land on two sides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from deferral_train.errors import InputError
from deferral_train.traces.reader import Traces


def split_prompts(traces: Traces, fractions: Sequence[float], seed: int = 0) -> tuple[Traces, ...]:
    """Split traces at random into parts with about these shares of the prompts.

    Args:
        traces: what to split.
        fractions: one positive share per part, together at most 1; the rest is left out.
        seed: of the permutation of prompt ids, which depends on nothing else.

    Raises:
        InputError: shares that are not positive or sum to more than 1, or too few prompts for a part.
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise InputError(f"fractions={list(fractions)}: use positive shares that sum to at most 1")
    ids = sorted(traces.prompt_ids)
    order = np.random.default_rng(seed).permutation(len(ids))
    bounds = np.round(np.concatenate([[0.0], np.cumsum(fractions)]) * len(ids)).astype(int)
    if (np.diff(bounds) < 1).any():
        raise InputError(
            f"fractions={list(fractions)}: {len(ids)} prompts are too few; every part needs one: give more"
        )
    return tuple(
        traces.select_prompts(ids[place] for place in sorted(order[start:stop]))
        for start, stop in itertools.pairwise(bounds)
    )
