"""Distributions of the form clip(q, b p, a p): the cap a is chosen, the floor b makes it sum to one.

Used by `lossy` (a = 1/(1-alpha), b = 1/beta) and `mentored` (a = 1/alpha, b = 1/beta). Both are piecewise in the ratios
q/p, so that a sort and prefix sums serve every cap and floor. Shapes: distributions [.., V], caps and floors [.., 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 2048  # caps that are tried at once
# A log cap beyond which no ratio of probabilities of this precision lies, with room for the steps of the finer grids.
MOST_LOG = {torch.float32: 88.0, torch.float64: 709.0}


def clip_between(q: Tensor, p: Tensor, floor: Tensor, cap: Tensor | float) -> Tensor:
    """max(min(q, cap * p), floor * p); an infinite cap leaves q where p > 0."""
    return torch.maximum(torch.minimum(q, capped(p, cap)), p * floor)


def capped(p: Tensor, cap: Tensor | float) -> Tensor:
    """cap * p with infinite cap * 0 = 0: an infinite cap is the largest number instead."""
    most = torch.finfo(p.dtype).max
    return p * (cap.clamp(max=most) if isinstance(cap, Tensor) else min(cap, most))


def floor_for_cut(q: Tensor, p: Tensor, cut: Tensor) -> Tensor:
    """The floor b = 1/beta in [0, 1] whose rise sum (b p - q)+ replaces a given cut R, [.., 1].

    As a function of b the rise is the largest of b P(A) - Q(A) over token sets A, and the best A is a prefix in the
    order of q/p; so b = min over prefixes of (R + Q(A))/P(A).
    """
    # Tokens with p = 0 have ratio inf or NaN, come last and add to Q only: they never improve the minimum.
    order = (q / p).argsort(dim=-1)
    mass_p = p.gather(-1, order).cumsum(dim=-1)
    mass_q = q.gather(-1, order).cumsum(dim=-1)
    return ((cut + mass_q) / mass_p).amin(dim=-1, keepdim=True).clamp(max=1.0)


def mentored_clip(q: Tensor, p: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The largest cap a >= 1 whose clip keeps KL(p||pi) <= limit in nats, and its normalising floor, [.., 1] each.

    The divergence grows with the cap. log a is narrowed down by grids of `GRID` values, each looked up in prefix sums,
    until it is known to the last bit. Where q itself is within the limit the cap lies above every ratio.
    """
    clips, width = _Clips.of(q, p), MOST_LOG[p.dtype]
    low = torch.zeros_like(p[..., :1])
    steps = torch.linspace(0.0, 1.0, GRID, dtype=p.dtype, device=p.device)
    while limit > 0 and width > torch.finfo(p.dtype).eps / 8:
        grid = torch.add(low, steps, alpha=width)
        within = clips.gain(grid) >= -limit
        last = (within.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        low, width = grid.gather(-1, last), width / (GRID - 1)
    cap = low.exp()
    return cap, clips.lookup(cap)[0]


@dataclass(frozen=True)
class _Clips:
    """Every clip of one pair of distributions, by sums over tokens in the order of q/p.

    Attributes:
        ratio: q/p in ascending order, [.., V].
        rise: sum (b p - q)+ of the floor b = ratio, [.., V].
        sums: of p, q and p log(q/p) over the first k tokens, and of p and q over the others, k = 0..V, [5, .., V+1].
    """

    ratio: Tensor
    rise: Tensor
    sums: Tensor

    @classmethod
    def of(cls, q: Tensor, p: Tensor) -> _Clips:
        # Tokens with p = 0 come last; where q = 0 the floor takes p and its logarithm is not asked for.
        ratio, order = (q / p).nan_to_num(nan=torch.inf, posinf=torch.inf).sort(dim=-1)
        p, q = p.gather(-1, order), q.gather(-1, order)
        terms = torch.stack([p, q, torch.xlogy(p, ratio).nan_to_num(neginf=0.0)])
        before, after = terms.cumsum(dim=-1), terms[:2].flip(-1).cumsum(dim=-1).flip(-1)
        rise = (ratio * before[0] - before[1]).cummax(dim=-1).values
        pad = torch.nn.functional.pad
        return cls(ratio, rise, torch.cat([pad(before, (1, 0)), pad(after, (0, 1))]))

    def lookup(self, cap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalising floors of some caps [.., G], and the sums above the caps and below the floors, [5, .., G]."""
        above = self._sums(torch.searchsorted(self.ratio, cap, right=True))
        cut = torch.addcmul(above[4], cap, above[3], value=-1).clamp(min=0.0)
        below = self._sums(torch.searchsorted(self.rise, cut, right=True).clamp(min=1))
        return ((cut + below[1]) / below[0]).clamp(max=1.0), above, below

    def _sums(self, place: Tensor) -> Tensor:
        return self.sums.gather(-1, place.expand(5, *place.shape))

    def gain(self, log_cap: Tensor) -> Tensor:
        """-KL(p||pi) of the clips with these caps and their normalising floors, [.., G]."""
        floor, above, below = self.lookup(log_cap.exp())
        return torch.addcmul(above[2], above[3], log_cap) - below[2] + torch.xlogy(below[0], floor)
