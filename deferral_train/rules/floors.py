"""Laws of the form clip(q, b p, a p): the cap a is chosen, the floor b makes it sum to one.

Used by `lossy` (a = 1/(1-alpha), b = 1/beta) and `mentored` (a = 1/alpha, b = 1/beta). Shapes: laws [.., V],
caps and floors [.., 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

BISECTIONS = 60  # 700/2^60 is below the last bit


def clip_between(q: Tensor, p: Tensor, floor: Tensor, cap: Tensor) -> Tensor:
    """max(min(q, cap * p), floor * p), with infinite cap * 0 = 0."""
    return torch.maximum(torch.minimum(q, _capped(p, cap)), p * floor)


def normalising_floor(q: Tensor, p: Tensor, cap: Tensor) -> Tensor:
    """The b = 1/beta in [0, 1] with sum_v max(min(q, cap p), b p) = 1; 0 (beta infinite) where nothing is
    cut.

    With R = sum (q - cap p)+ the root solves sum (b p - q)+ = R. As a function of b the left side is the
    largest of b P(A) - Q(A) over token sets A, and the best A is a prefix in the order of q/p; so b = min
    over prefixes of (R + Q(A))/P(A).
    """
    return floor_for_cut(q, p, (q - torch.minimum(q, _capped(p, cap))).sum(dim=-1, keepdim=True))


def floor_for_cut(q: Tensor, p: Tensor, cut: Tensor) -> Tensor:
    """The floor b whose rise sum (b p - q)+ replaces a given cut R, [.., 1]."""
    ratio = torch.where(p > 0, q / p, torch.full_like(p, torch.inf))
    order = ratio.argsort(dim=-1)
    mass_p = p.gather(-1, order).cumsum(dim=-1)
    mass_q = q.gather(-1, order).cumsum(dim=-1)
    # Tokens with p = 0 come last and add to Q only: they never improve the minimum.
    best = ((cut + mass_q) / mass_p).nan_to_num(nan=torch.inf).amin(dim=-1, keepdim=True)
    return torch.where(cut > 0, best.clamp(max=1.0), torch.zeros_like(best))


def divergence_of_clip(q: Tensor, p: Tensor, cap: Tensor) -> Tensor:
    """KL(p||pi) in nats of pi = clip(q, b p, cap p) with its normalising floor b, [.., 1]."""
    pi = clip_between(q, p, normalising_floor(q, p, cap), cap)
    terms = torch.where(p > 0, p * (torch.log(p) - torch.log(pi)), torch.zeros_like(p))
    return terms.sum(dim=-1, keepdim=True)


def mentored_cap(q: Tensor, p: Tensor, limit: float) -> Tensor:
    """The largest cap a >= 1 whose clip keeps KL(p||pi) <= limit; infinite where q itself does.

    The divergence grows with the cap; log a is found by bisection to the last bit.
    """
    unlimited = torch.full_like(p[..., :1], torch.inf)
    if limit == 0:
        return torch.ones_like(unlimited)
    low, high = torch.zeros_like(unlimited), torch.full_like(unlimited, _most_log(p.dtype))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        within = divergence_of_clip(q, p, middle.exp()) <= limit
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    free = divergence_of_clip(q, p, unlimited) <= limit
    return torch.where(free, unlimited, low.exp())


def _most_log(dtype: torch.dtype) -> float:
    """A log cap beyond which no probability ratio of this precision lies."""
    return 700.0 if dtype == torch.float64 else 85.0


def _capped(p: Tensor, cap: Tensor) -> Tensor:
    # An infinite cap is the largest number instead, so that gradients stay finite.
    return torch.where(p > 0, p * cap.clamp(max=torch.finfo(p.dtype).max), torch.zeros_like(p))
