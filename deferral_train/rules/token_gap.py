"""Token rule by a learned estimate of what each token costs the finished text: form (b) of docs/which_label.md.

With Q(v) the score of the text that the verifier finishes behind token v, gap(v) = E_{y ~ p} Q(y) - Q(v) is what
keeping v loses against the verifier's own token; its mean under p is 0. Of pi_Token (equation 11), which keeps all but
a set S, the emitted token loses sum_{v not in S} q(v) gap(v), and D_TV(q, pi_Token) of the drafted tokens are rejected.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import Dial, TokenRule, register
from deferral_train.rules.summary import FIELDS, TOKEN_FIELDS, Summary

ROUNDS = 4  # eight raise the objective by 2e-6 of 0.2 on the Multi30k pair


@runtime_checkable
class TokenGapEstimator(Protocol):
    """Protocol of the heads that `TokenGapRule` accepts.

    `features`: summary fields it reads, those about one token among them; `gap(summary)`: the estimate of gap(x) [..]
    of the summary's token; `token_gap(tokens, drafter_logprobs, verifier_logprobs, summary)`: of each candidate
    [.., K], whose ids are `tokens` [.., K], or the whole vocabulary in order where that is None.
    """

    features: tuple[str, ...]

    def gap(self, summary: Summary) -> Tensor:
        """The estimate for the token spoken of, [..]."""
        ...

    def token_gap(
        self, tokens: Tensor | None, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary
    ) -> Tensor:
        """The estimate for every candidate, [.., K]."""
        ...


@register
@dataclass(frozen=True, eq=False)
class TokenGapRule(TokenRule):
    """Keep v iff gap(v) <= alpha times its price, the chance max(0, 1 - p(v)/q(v)) that the exact check rejects it.

    ``priced`` prices all tokens of a position together, by D_TV(q, pi_Token) itself: keep all but the set S that makes
    sum_{v in S} q(v) gap(v) - alpha D_TV(q, pi_Token) large (:func:`costly_tokens`).
    """

    name: ClassVar[str] = "token_gap"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=None, drafter=None, unbounded=True)
    dial_is_price: ClassVar[bool] = True
    needs = frozenset()
    reads_drafter_confidence: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 2

    head: Any = None
    alpha: float = 0.1
    priced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        features = getattr(self.head, "features", None)
        if features is None or not isinstance(self.head, TokenGapEstimator):
            raise InputError(
                f"rule token_gap: head is {type(self.head).__name__}; pass an object with .features, .gap(summary) and "
                ".token_gap(tokens, drafter_logprobs, verifier_logprobs, summary)"
            )
        unknown = [name for name in features if name not in FIELDS]
        if unknown:
            raise InputError(f"rule token_gap: the head reads unknown summary field(s) {', '.join(unknown)}")
        object.__setattr__(self, "needs", frozenset(features) - TOKEN_FIELDS)

    @property
    def alone(self) -> TokenGapRule:
        """Each token by its own price."""
        rule = copy.copy(self)  # whose dial may be one for each row
        object.__setattr__(rule, "priced", False)
        return rule

    @property
    def gap_needs(self) -> frozenset[str]:
        """The head's features, those of the drafted token among them."""
        return frozenset(self.head.features)

    def estimated_gap(self, summary: Summary) -> Tensor:
        """gap(x) of the drafted token [..], in the labels' unit."""
        return self.head.gap(summary)

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """Bool [.., V]: of the whole vocabulary, in order."""
        return self.keep_tokens(None, drafter_logprobs, verifier_logprobs, summary)

    def keep_tokens(
        self, tokens: Tensor | None, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary
    ) -> Tensor:
        """Bool [.., K]; ``priced``, with candidates fewer than V, takes these as if they were all."""
        gap = self.head.token_gap(tokens, drafter_logprobs, verifier_logprobs, summary)
        if not self.priced:
            return gap <= self.alpha * price(drafter_logprobs, verifier_logprobs)
        q, p = drafter_logprobs.exp(), verifier_logprobs.exp()
        return ~costly_tokens(q, p, q * gap, self.alpha)


def price(drafter_logprobs: Tensor, verifier_logprobs: Tensor) -> Tensor:
    """Chance that the exact check rejects each token, max(0, 1 - p/q), from log q and log p.

    0 where a token is never drafted, not-a-number where neither model can say it.
    """
    return (1 - (verifier_logprobs - drafter_logprobs).exp()).clamp(min=0.0)


def costly_tokens(q: Tensor, p: Tensor, gain: Tensor, alpha: float) -> Tensor:
    """The set S [.., V], bool, that makes sum_{v in S} gain(v) - alpha * sum_{v in S} max(0, q(v) - D p(v)) large.

    D = sum_{v in S} q(v) couples the tokens, so S is sought by a few rounds, and taken only where it beats dropping all
    and none. Each round drops v where its gain exceeds alpha times its price given the D of the round before: its own
    rejection max(0, q - D p), minus what q(v) more in D spares the others, q(v) * sum p over the dropped with q > D p.

    Args:
        q, p: of every token [.., V].
        gain: what dropping each token gains, [.., V].
        alpha: price of a rejection.
    """
    found = torch.zeros_like(q, dtype=torch.bool)
    best = torch.zeros_like(gain[..., :1])  # keeping all gains nothing
    dropped, mass, spared = ~found, q.sum(-1, keepdim=True), torch.zeros_like(best)
    for _ in range(ROUNDS + 1):
        excess = (q - mass * p).clamp(min=0)
        worth = ((gain - alpha * excess) * dropped).sum(-1, keepdim=True)
        found = torch.where(worth > best, dropped, found)
        best = torch.maximum(worth, best)
        dropped = gain > alpha * (excess - q * spared)
        mass = (q * dropped).sum(-1, keepdim=True)
        spared = (p * (dropped & (q > mass * p))).sum(-1, keepdim=True)
    return found
