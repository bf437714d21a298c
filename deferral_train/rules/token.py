"""Token rules: each answers "keep this token?" from its probabilities and the summary.

A kept token is always emitted when drafted; any other is checked against pi_Token, equation (11). Decisions
read the distributions before temperature and truncation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import Dial, TokenRule, register
from deferral_train.rules.summary import Summary


@register
@dataclass(frozen=True)
class TokenV1(TokenRule):
    """Keep v iff q(v) >= max p - alpha. Equation (13). At alpha = -1 nothing is kept."""

    name: ClassVar[str] = "token_v1"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=-1.0, drafter=1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_max"})
    monotone: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 2
    reads_drafter_confidence: ClassVar[bool] = True

    alpha: float = 0.2

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """max p - q(v) <= alpha, bool [.., K]."""
        return summary["verifier_max"].unsqueeze(-1) - drafter_logprobs.exp() <= self.alpha


@register
@dataclass(frozen=True)
class TokenV2(TokenRule):
    """Keep v iff p(v) >= max p - alpha. Equation (14). At alpha = -1 nothing is kept."""

    name: ClassVar[str] = "token_v2"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=-1.0, drafter=1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_max"})
    monotone: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 2

    alpha: float = 0.2

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """max p - p(v) <= alpha, bool [.., K]."""
        return summary["verifier_max"].unsqueeze(-1) - verifier_logprobs.exp() <= self.alpha


@register
@dataclass(frozen=True)
class TokenV3(TokenRule):
    """Keep v iff p(v) >= (1 - alpha) max p. Equation (15).

    Not lossless at alpha = 0: the verifier's argmax keeps its free pass.
    """

    name: ClassVar[str] = "token_v3"
    dial: ClassVar[Dial] = Dial("alpha", 0.0, 1.0, lossless=None, drafter=1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_max"})
    monotone: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 2

    alpha: float = 0.2

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """p(v) >= (1 - alpha) max p, bool [.., K]."""
        return verifier_logprobs.exp() >= (1 - self.alpha) * summary["verifier_max"].unsqueeze(-1)


@register
@dataclass(frozen=True)
class Typical(TokenRule):
    """Typical acceptance (Medusa, arXiv 2401.10774): keep v iff p(v) > min(epsilon, delta exp(-H(p))).

    delta defaults to sqrt(epsilon), as Medusa sets it. No epsilon is lossless; at 0 every token is kept.
    """

    name: ClassVar[str] = "typical"
    dial: ClassVar[Dial] = Dial("epsilon", 0.0, 1.0, lossless=None, drafter=0.0)
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_entropy"})
    monotone: ClassVar[bool] = True

    epsilon: float = 0.09
    delta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta is not None and not 0 <= self.delta <= 1:
            raise InputError(
                f"rule typical: delta is {self.delta}; allowed: 0 to 1, or None for sqrt(epsilon)"
            )

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """log p(v) > log min(epsilon, delta exp(-H(p))), bool [.., K]; in logs, for tokens that underflow."""
        delta = math.sqrt(self.epsilon) if self.delta is None else self.delta
        threshold = (_log(delta) - summary["verifier_entropy"].unsqueeze(-1)).clamp(max=_log(self.epsilon))
        return verifier_logprobs > threshold


@register
@dataclass(frozen=True)
class LogitMargin(TokenRule):
    """Greedy logit margin (transformers issue 48636): keep v iff max z_p - z_p(v) <= margin, z_p the logits.

    The same as log max p - log p(v) <= margin, so that at margin > 0 it is V3 with 1 - alpha = exp(-margin).
    At margin = 0 nothing is kept, not even the argmax, and execution is lossless at every temperature. Meant
    for temperature 0; with a request limit (max_request_loss) it is that issue's bounded acceptance.
    """

    name: ClassVar[str] = "logit_margin"
    dial: ClassVar[Dial] = Dial("margin", 0.0, 10.0, lossless=0.0, drafter=None)
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_max"})
    monotone: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 2

    margin: float = 0.5

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """log max p - log p(v) <= margin and margin > 0, bool [.., K]."""
        gap = summary["verifier_max"].log().unsqueeze(-1) - verifier_logprobs
        return (gap <= self.margin) & (self.margin > 0)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
