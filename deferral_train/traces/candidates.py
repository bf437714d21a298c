"""The logged candidates of each position, as token rules read them, with what they leave out.

K candidates of each model are logged, so a position has up to 2K distinct tokens. Everything outside them has
at most ``drafter_rest`` and ``verifier_rest`` probability: the bound on what a token rule can miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.traces.reader import Traces

# Unit roundoff of float16: a stored log-probability x is off by at most |x| times this.
HALF_ROUNDOFF = 2.0**-11


@dataclass(frozen=True)
class Candidates:
    """Candidates of N positions, drafter's K first, then the verifier's K.

    Attributes:
        ids: [N, 2K] int64; a verifier candidate that the drafter has too appears twice.
        valid: [N, 2K] bool, False on the second appearance.
        drafter_logprobs, verifier_logprobs: [N, 2K] float32, from float16.
        drafter_rest, verifier_rest: [N] float32, probability outside the union of candidates.
        rounding: [N] float32, bound on the probability mistaken through the float16 of either model.
    """

    ids: Tensor
    valid: Tensor
    drafter_logprobs: Tensor
    verifier_logprobs: Tensor
    drafter_rest: Tensor
    verifier_rest: Tensor
    rounding: Tensor


def read_candidates(traces: Traces, rows: slice | np.ndarray | None = None) -> Candidates:
    """Candidates of some rows (default all; for long traces, take slices).

    Raises:
        InputError: the traces were collected with ``--log-top-k 0``.
    """
    if not traces.manifest.top_k:
        raise InputError(
            "these traces log no candidates (--log-top-k 0); token rules need them: collect again"
        )
    where = slice(None) if rows is None else rows

    def pair(first: str, second: str) -> Tensor:
        return torch.from_numpy(
            np.concatenate([traces.column(first)[where], traces.column(second)[where]], axis=1)
        )

    ids = pair("drafter_top_ids", "verifier_top_ids").long()
    drafter = pair("drafter_top_drafter_logprobs", "verifier_top_drafter_logprobs").float()
    verifier = pair("drafter_top_verifier_logprobs", "verifier_top_verifier_logprobs").float()
    valid = first_appearances(ids)
    rests = [(1 - (law.exp() * valid).sum(dim=1)).clamp(0.0, 1.0) for law in (drafter, verifier)]
    errors = [_rounding(law, valid) for law in (drafter, verifier)]
    return Candidates(ids, valid, drafter, verifier, rests[0], rests[1], torch.maximum(*errors))


def first_appearances(ids: Tensor) -> Tensor:
    """True where an id appears for the first time in its row, [N, C]."""
    order = ids.argsort(dim=1, stable=True)
    ranked = ids.gather(1, order)
    fresh = torch.ones_like(ranked, dtype=torch.bool)
    fresh[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    return torch.zeros_like(fresh).scatter(1, order, fresh)


def _rounding(logprobs: Tensor, valid: Tensor) -> Tensor:
    """Most by which float16 can have moved the candidates' probability: sum p (exp(|log p| u) - 1)."""
    finite = logprobs.clamp(min=-1e4)
    return (finite.exp() * torch.expm1(finite.abs() * HALF_ROUNDOFF) * valid).sum(dim=1)
