"""Acceptance, residual and emitted distribution of a drafted position, from a rule's target pi.

Draft x ~ q, accept with probability min(1, pi(x)/q(x)), else sample max(0, pi - q), normalised. The q is the
distribution that x was really drawn from: it is never renormalised onto another support. Shapes [.., V];
    probabilities.
Source: speculative sampling (Leviathan et al. 2023), for any target: Narasimhan et al. 2025, Algorithm 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_distribution(q: Tensor, p: Tensor, keep: Tensor) -> Tensor:
    """pi_Token(v) = q(v) (1 - r(v)) + p(v) eta, with eta = sum_v r(v) q(v) and keep = (r = 0). Equation (11).

    Args:
        q, p: sampling distributions [.., V].
        keep: bool, broadcastable to [.., V].
    """
    kept = q * keep
    eta = (q - kept).sum(dim=-1, keepdim=True)
    return torch.addcmul(kept, p, eta)


def onto_support(pi: Tensor, p: Tensor, support: Tensor) -> Tensor:
    """pi without the tokens that the verifier's processing forbids; their mass goes to p."""
    allowed = pi * support
    return torch.addcmul(allowed, p, (pi - allowed).sum(dim=-1, keepdim=True))


def acceptance(pi: Tensor, q: Tensor) -> Tensor:
    """Probability that a drafted token v is emitted: min(1, pi(v)/q(v)); 1 where q(v) = 0 <= pi(v)."""
    return torch.where(pi >= q, torch.ones_like(q), pi / q)


def residual(pi: Tensor, q: Tensor) -> Tensor:
    """Distribution of the correction after a rejection: max(0, pi - q), normalised; pi where nothing is left."""
    excess = (pi - q).clamp(min=0.0)
    total = excess.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, excess / total, pi)


def rejection_mass(pi: Tensor, q: Tensor) -> Tensor:
    """Probability that a drafted token is rejected: D_TV(q, pi) = sum_v max(0, q - pi), [..]."""
    return (q - pi).clamp(min=0.0).sum(dim=-1)


def emitted_distribution(pi: Tensor, q: Tensor) -> Tensor:
    """Distribution of the emitted token, [.., V], summed in full: q * acceptance + rejection mass * residual.

    Equals pi wherever pi sums to one: the identity that every rule is tested by.
    """
    accepted = q * acceptance(pi, q)
    return accepted + rejection_mass(pi, q).unsqueeze(-1) * residual(pi, q)


def expected_tokens_per_call(acceptance_rate: float | Tensor, drafted: int) -> float | Tensor:
    """Tokens emitted per verifier call with i.i.d. acceptance a and gamma drafts: (1-a^(gamma+1))/(1-a).

    The correction or bonus token is counted; gamma + 1 at a = 1. Leviathan et al. 2023, equation (1).
    """
    rate = torch.as_tensor(acceptance_rate, dtype=torch.float64)
    powers = torch.stack([rate**k for k in range(drafted + 1)])
    total = powers.sum(dim=0)
    return total if isinstance(acceptance_rate, Tensor) else float(total)
