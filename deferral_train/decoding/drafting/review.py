"""A drafter reviews what a smaller one proposed: leniently, and with the exact distribution of what comes out.

B batch, T proposed tokens, V vocabulary. q is the distribution that the proposals were drawn from, p the reviewer's own
distribution, l >= 1 the lenience. A proposed token x stands with probability min(1, l p(x)/q(x)), else a token from
max(0, p - q), normalised, takes its place and the rest is dropped; after a block that stands, one token from p.
What comes out at a reviewed place is *not* drawn from p where l > 1 but from

    q~ = a + (1 - sum a) norm(max(0, p - q)),   a = min(q, l p),

which is what whoever reviews next must be told. Sources: Leviathan et al. 2023, A.5 (lenience); Chen et al. 2024
(lenience between drafters only); the distribution q~ is derived in docs/equations.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.rules.distributions import lowest_argmax, one_hot
from deferral_train.rules.emission import residual
from deferral_train.rules.sampling import draw, uniforms


@dataclass(frozen=True)
class Review:
    """The outcome of a review of a block.

    Attributes:
        accepted: [B] int64, proposed tokens that stand.
        next_token: [B] int64, the correction, or the reviewer's own token behind a whole block.
    """

    accepted: Tensor
    next_token: Tensor


def reviewed_distribution(proposal: Tensor, reviewer: Tensor, lenience: float) -> Tensor:
    """q~, the distribution of the token that comes out of a reviewed place, [.., V].

    Args:
        proposal: q, the distribution that the proposed token was drawn from [.., V]; a one-hot for Max-Gram.
        reviewer: p, the reviewer's sampling distribution [.., V].
        lenience: l, at least 1; at 1 the distribution is p.
    """
    if lenience == 1.0:
        return reviewer
    stands = torch.minimum(proposal, lenience * reviewer)
    rest = (proposal - stands).sum(dim=-1, keepdim=True)
    return stands + rest * residual(reviewer, proposal)


def review_sampled(
    drafted: Tensor,
    proposal: Tensor | None,
    reviewer: Tensor,
    lengths: Tensor,
    lenience: float,
    generator: torch.Generator | None,
) -> Review:
    """Review a block when sampling.

    Args:
        drafted: [B, T] int64; row b proposes the first ``lengths[b]``.
        proposal: q [B, T, V], the distributions that they were drawn from; None for one-hots (Max-Gram).
        reviewer: p [B, T+1, V].
        lengths: [B] int64.
        lenience: l, at least 1.
        generator: source of randomness.
    """
    rows, places = drafted.shape
    checks, last = uniforms(rows, places, generator, reviewer)
    chance = reviewer[:, :places].gather(2, drafted[..., None])[..., 0] * lenience
    drawn = 1.0 if proposal is None else proposal.gather(2, drafted[..., None])[..., 0]
    stands = checks * drawn < chance
    accepted = _prefix(stands, lengths)
    row = torch.arange(rows, device=drafted.device)
    weights = reviewer[row, accepted]
    rejected = accepted < lengths
    if bool(rejected.any()):
        where, place = row[rejected], accepted[rejected]
        if proposal is None:
            distribution = one_hot(drafted[where, place], reviewer.shape[-1], reviewer.dtype)
        else:
            distribution = proposal[where, place]
        weights[where] = residual(weights[where], distribution)
    return Review(accepted, draw(weights, last))


def review_greedy(
    drafted: Tensor, proposed: Tensor | None, logits: Tensor, lengths: Tensor, lenience: float
) -> Review:
    """Review a block at temperature 0, where nothing is random.

    A token stands if it is the reviewer's argmax, or if l > 1 and l p(x) > q(x), with p the distribution before
    temperature and q(x) the probability that the proposer gave it: the published greedy rule.

    Args:
        drafted: [B, T] int64.
        proposed: q(x) of the drafted tokens [B, T], 1 for Max-Gram; read only where l > 1.
        logits: the reviewer's decision logits [B, T+1, V].
        lengths: [B] int64.
        lenience: l, at least 1.
    """
    places = drafted.shape[1]
    best = lowest_argmax(logits)
    stands = drafted == best[:, :places]
    if lenience > 1.0 and places and proposed is not None:
        chance = torch.log_softmax(logits[:, :places], dim=-1).gather(2, drafted[..., None])[..., 0].exp()
        stands = stands | (lenience * chance > proposed)
    accepted = _prefix(stands, lengths)
    return Review(accepted, best.gather(1, accepted[:, None])[:, 0])


def _prefix(stands: Tensor, lengths: Tensor) -> Tensor:
    """Leading tokens that stand, [B]."""
    inside = torch.arange(stands.shape[1], device=stands.device) < lengths[:, None]
    return (stands & inside).long().cumprod(dim=1).sum(dim=1)
