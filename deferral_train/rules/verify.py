"""Verification of a drafted block for a whole batch: accepted length, next token, origin of each token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Origin(IntEnum):
    """Where an emitted token came from."""

    NONE = 0
    KEPT = 1  # drafted, not deferred
    ACCEPTED = 2  # drafted, deferred, passed the check
    RESAMPLED = 3  # correction after a rejection
    BONUS = 4  # after a block that was emitted whole
    UNVERIFIED = 5  # drafted and never scored by the verifier (lazy execution)


@dataclass(frozen=True)
class Verdict:
    """What happens to a drafted block.

    Attributes:
        accepted: [B] int64, drafted tokens emitted (kept + accepted).
        next_token: [B] int64, correction or bonus; -1 where the bonus is withheld.
        origin: [B, T+1] int8, one Origin per emitted token, NONE after.
        deferred: [B, T] bool, the decision at each drafted position (token rule: drafted token not kept).
        spent: [B] running estimated loss under max_request_loss, else None.
    """

    accepted: Tensor
    next_token: Tensor
    origin: Tensor
    deferred: Tensor
    spent: Tensor | None
