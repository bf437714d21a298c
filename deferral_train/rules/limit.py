"""The walk along a drafted block: how many tokens stand, under a limit on the estimated loss per request.

Knows scores, nothing about laws. B batch, T drafted positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.scoring import Scores


@dataclass(frozen=True)
class Walk:
    """Where each row stopped.

    Attributes:
        accepted: [B] int64, drafted tokens that stand.
        kept: [B, T] bool, stands by the rule's leave.
        allowed: [B, T] bool, the rule was in force (False: the limit made the position lossless).
        spent: [B], or None without a limit.
    """

    accepted: Tensor
    kept: Tensor
    allowed: Tensor
    spent: Tensor | None


def walk(
    scores: Scores, lengths: Tensor, uniform: Tensor | None, limit: float | None, spent: Tensor | None
) -> Walk:
    """Accept along each row until the first rejection.

    Args:
        scores: [B, T].
        lengths: [B], drafted tokens per row.
        uniform: [B, T] in [0, 1); None at temperature 0, where every ratio is 0 or 1.
        limit, spent: as in `verify_block`.
    """
    drafts = scores.ratio.shape[1]
    inside = torch.arange(drafts, device=lengths.device) < lengths.unsqueeze(1)
    passes = _passes(scores.ratio, uniform)
    if limit is None:
        accepted = (passes & inside).long().cumprod(dim=1).sum(dim=1)
        return Walk(accepted, scores.kept, torch.ones_like(scores.kept), None)
    return _limited(scores, inside, passes, _passes(scores.exact_ratio, uniform), limit, spent)


def _passes(ratio: Tensor, uniform: Tensor | None) -> Tensor:
    return ratio > 0 if uniform is None else uniform < ratio


def _limited(
    scores: Scores, inside: Tensor, passes: Tensor, exact_passes: Tensor, limit: float, spent: Tensor | None
) -> Walk:
    rows, drafts = passes.shape
    if scores.gap is None:  # no row drafted anything: nothing to cost
        costs = torch.zeros(rows, drafts, dtype=torch.float64, device=passes.device)
    else:
        costs = scores.gap.double().clamp(min=0.0)
    total = _opening(spent, rows, passes.device)
    alive = torch.ones(rows, dtype=torch.bool, device=passes.device)
    allowed, kept = torch.zeros_like(passes), torch.zeros_like(passes)
    accepted = torch.zeros(rows, dtype=torch.int64, device=passes.device)
    for t in range(drafts):
        # A cost that is not finite is never within the limit.
        allowed[:, t] = (total < limit) & (total + costs[:, t] <= limit)
        stands = torch.where(allowed[:, t], passes[:, t], exact_passes[:, t])
        alive = alive & inside[:, t] & stands
        kept[:, t] = scores.kept[:, t] & allowed[:, t]
        total = total + torch.where(alive & kept[:, t], costs[:, t], torch.zeros_like(total))
        accepted = accepted + alive
    return Walk(accepted, kept, allowed, total)


def _opening(spent: Tensor | None, rows: int, device: torch.device) -> Tensor:
    if spent is None:
        return torch.zeros(rows, dtype=torch.float64, device=device)
    spent = torch.as_tensor(spent, dtype=torch.float64, device=device)
    if spent.shape != (rows,) or not bool((spent >= 0).all()):
        raise InputError(f"spent must hold one number >= 0 per row, [{rows}]; got {spent.tolist()}")
    return spent
