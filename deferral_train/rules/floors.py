"""Distributions of the form clip(q, b p, a p): the cap a is chosen, the floor b makes it sum to one.

Used by `lossy` (a = 1/(1-alpha), b = 1/beta) and `mentored` (a = 1/alpha, b = 1/beta). Both are piecewise in the ratios
q/p, so that a sort and prefix sums serve every cap and floor. Shapes: distributions [.., V], caps and floors [.., 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 256  # caps that are tried at once


def clip_between(q: Tensor, p: Tensor, floor: Tensor, cap: Tensor | float) -> Tensor:
    """max(min(q, cap * p), floor * p); an infinite cap leaves q where p > 0."""
    return torch.maximum(torch.minimum(q, capped(p, cap)), p * floor)


def capped(p: Tensor, cap: Tensor | float) -> Tensor:
    """cap * p with infinite cap * 0 = 0: an infinite cap is the largest number instead."""
    most = torch.finfo(p.dtype).max
    return p * (cap.clamp(max=most) if isinstance(cap, Tensor) else min(cap, most))


def normalising_floor(q: Tensor, p: Tensor, cap: Tensor | float) -> Tensor:
    """The b = 1/beta in [0, 1] with sum_v max(min(q, cap p), b p) = 1; one without effect where nothing is cut.

    With R = sum (q - cap p)+ the root solves sum (b p - q)+ = R. As a function of b the left side is the
    largest of b P(A) - Q(A) over token sets A, and the best A is a prefix in the order of q/p; so b = min
    over prefixes of (R + Q(A))/P(A).
    """
    return floor_for_cut(q, p, (q - torch.minimum(q, capped(p, cap))).sum(dim=-1, keepdim=True))


def floor_for_cut(q: Tensor, p: Tensor, cut: Tensor) -> Tensor:
    """The floor b whose rise sum (b p - q)+ replaces a given cut R, [.., 1]."""
    # Tokens with p = 0 have ratio inf or NaN, come last and add to Q only: they never improve the minimum.
    order = (q / p).argsort(dim=-1)
    mass_p = p.gather(-1, order).cumsum(dim=-1)
    mass_q = q.gather(-1, order).cumsum(dim=-1)
    return ((cut + mass_q) / mass_p).amin(dim=-1, keepdim=True).clamp(max=1.0)


def divergence_of_clip(q: Tensor, p: Tensor, cap: Tensor) -> Tensor:
    """KL(p||pi) in nats of pi = clip(q, b p, cap p) with its normalising floor b, [.., 1]."""
    return _divergence(p, clip_between(q, p, normalising_floor(q, p, cap), cap))


def _divergence(p: Tensor, pi: Tensor) -> Tensor:
    terms = torch.where(p > 0, p * (torch.log(p) - torch.log(pi)), torch.zeros_like(p))
    return terms.sum(dim=-1, keepdim=True)


def mentored_cap(q: Tensor, p: Tensor, limit: float) -> Tensor:
    """The largest cap a >= 1 whose clip keeps KL(p||pi) <= limit; infinite where q itself does.

    The divergence grows with the cap. log a is narrowed down by grids of `GRID` values, each looked up in prefix sums,
    until it is known to the last bit.
    """
    unlimited = torch.full_like(p[..., :1], torch.inf)
    if limit == 0:
        return torch.ones_like(unlimited)
    clips = _Clips.of(q, p)
    low, width = torch.zeros_like(unlimited), _most_log(p.dtype)
    steps = torch.linspace(0.0, 1.0, GRID, dtype=p.dtype, device=p.device)
    while width > torch.finfo(p.dtype).eps / 8:
        grid = low + width * steps
        within = clips.divergence(grid) <= limit
        last = within.sum(dim=-1, keepdim=True).clamp(min=1) - 1
        low, width = grid.gather(-1, last), width / (GRID - 1)
    return torch.where(_divergence(p, q) <= limit, unlimited, low.exp())


@dataclass(frozen=True)
class _Clips:
    """Every clip of one pair of distributions, by sums over tokens in the order of q/p.

    Attributes:
        ratio: q/p in ascending order, [.., V].
        rise: sum (b p - q)+ of the floor b = ratio, [.., V].
        p_before, q_before, log_before: sums of p, q and p log(q/p) over the first k tokens, k = 0..V, [.., V+1].
        p_after, q_after: sums over all but the first k.
    """

    ratio: Tensor
    rise: Tensor
    p_before: Tensor
    q_before: Tensor
    log_before: Tensor
    p_after: Tensor
    q_after: Tensor

    @classmethod
    def of(cls, q: Tensor, p: Tensor) -> _Clips:
        ratio, order = (q / p).nan_to_num(nan=torch.inf, posinf=torch.inf).sort(dim=-1)
        p, q = p.gather(-1, order), q.gather(-1, order)
        inner = (p > 0) & (q > 0)
        logs = torch.where(inner, p * torch.where(inner, ratio, 1.0).log(), 0.0)
        before = [torch.nn.functional.pad(one.cumsum(dim=-1), (1, 0)) for one in (p, q, logs)]
        after = [torch.nn.functional.pad(one.flip(-1).cumsum(dim=-1).flip(-1), (0, 1)) for one in (p, q)]
        rise = torch.where(p > 0, ratio * before[0][..., 1:] - before[1][..., 1:], torch.inf)
        return cls(ratio, rise.cummax(dim=-1).values, *before, *after)

    def divergence(self, log_cap: Tensor) -> Tensor:
        """KL(p||pi) of the clips with these caps and their normalising floors, [.., G]."""
        cap = log_cap.exp()
        above = torch.searchsorted(self.ratio, cap, right=True)
        p_above = self.p_after.gather(-1, above)
        cut = (self.q_after.gather(-1, above) - cap * p_above).clamp(min=0.0)
        below = torch.searchsorted(self.rise, cut, right=True).clamp(min=1)
        p_below = self.p_before.gather(-1, below)
        floor = ((cut + self.q_before.gather(-1, below)) / p_below).clamp(max=1.0)
        between = self.log_before.gather(-1, above) - self.log_before.gather(-1, below)
        return -(p_above * log_cap + between + torch.xlogy(p_below, floor))


def _most_log(dtype: torch.dtype) -> float:
    """A log cap beyond which no probability ratio of this precision lies."""
    return 700.0 if dtype == torch.float64 else 85.0
