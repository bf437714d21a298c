"""Position rules: each is one comparison on the summary.

Source of all that name no other: Narasimhan et al. 2025 (arXiv 2405.19261), Table 3; equation numbers as in
docs/equations.md.
Every rule is written as "defer iff estimated gain > price", so that a tie keeps the drafter. The log rules
sweep up to `MOST_NATS`, above the entropy of any vocabulary below e^20 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import Dial, PositionRule, register
from deferral_train.rules.summary import Summary

MOST_NATS = 20.0


@register
@dataclass(frozen=True)
class Chow(PositionRule):
    """Defer iff max q < 1 - alpha. Equation (2).

    At alpha = 0 it always defers, also where q is a point mass (or rounds to one): the limit from above for
    any q of full support, so that its lossless end is exact.
    """

    name: ClassVar[str] = "chow"
    dial: ClassVar[Dial] = Dial("alpha", 0.0, 1.0, lossless=0.0, drafter=1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"drafter_max"})
    stage: ClassVar[str] = "draft"
    reads_drafter_confidence: ClassVar[bool] = True
    plug_in: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 0.2

    def defer(self, summary: Summary) -> Tensor:
        """max q < 1 - alpha, bool [..]."""
        if self.is_lossless:
            return summary.full(True)
        return summary["drafter_max"] < 1 - self.alpha


@register
@dataclass(frozen=True)
class ChowLog(PositionRule):
    """Defer iff H(q) > alpha (nats); always at alpha = 0, as Chow does."""

    name: ClassVar[str] = "chow_log"
    dial: ClassVar[Dial] = Dial("alpha", 0.0, MOST_NATS, lossless=0.0, drafter=MOST_NATS, sweep=(0.0, 6.0))
    needs: ClassVar[frozenset[str]] = frozenset({"drafter_entropy"})
    stage: ClassVar[str] = "draft"
    reads_drafter_confidence: ClassVar[bool] = True
    plug_in: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 1.0

    def defer(self, summary: Summary) -> Tensor:
        """H(q) > alpha, bool [..]."""
        if self.is_lossless:
            return summary.full(True)
        return summary["drafter_entropy"] > self.alpha


@register
@dataclass(frozen=True)
class Diff(PositionRule):
    """Defer iff max q < max p - alpha. Equation (5), Remark 1.

    At alpha = -1 the right side exceeds 1, so that it always defers.
    """

    name: ClassVar[str] = "diff"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=-1.0, drafter=1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"drafter_max", "verifier_max"})
    reads_drafter_confidence: ClassVar[bool] = True
    plug_in: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 0.2

    def defer(self, summary: Summary) -> Tensor:
        """max p - max q > alpha, bool [..]."""
        return summary["verifier_max"] - summary["drafter_max"] > self.alpha


@register
@dataclass(frozen=True)
class DiffLog(PositionRule):
    """Defer iff H(q) > H(p) + alpha (nats)."""

    name: ClassVar[str] = "diff_log"
    dial: ClassVar[Dial] = Dial(
        "alpha", -MOST_NATS, MOST_NATS, lossless=-MOST_NATS, drafter=MOST_NATS, sweep=(-4.0, 4.0)
    )
    needs: ClassVar[frozenset[str]] = frozenset({"drafter_entropy", "verifier_entropy"})
    reads_drafter_confidence: ClassVar[bool] = True
    plug_in: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 0.2

    def defer(self, summary: Summary) -> Tensor:
        """H(q) - H(p) > alpha, bool [..]."""
        return summary["drafter_entropy"] - summary["verifier_entropy"] > self.alpha


@register
@dataclass(frozen=True)
class Opt(PositionRule):
    """Defer iff max q < max p - alpha D_TV(p, q). Equation (10).

    alpha is any finite number, and no finite value is lossless at every temperature: maxima are of the distributions
    before temperature, D_TV of those after, so that D_TV may be arbitrarily small where max q > max p. At
    temperatures 0 and 1 without truncation any alpha < -1 is lossless and any alpha >= 1 keeps the drafter,
    because |max p - max q| <= D_TV there.
    """

    name: ClassVar[str] = "opt"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=None, drafter=None, unbounded=True)
    needs: ClassVar[frozenset[str]] = frozenset({"drafter_max", "verifier_max", "tv"})
    reads_drafter_confidence: ClassVar[bool] = True
    plug_in: ClassVar[bool] = True
    dial_is_price: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 0.2

    def defer(self, summary: Summary) -> Tensor:
        """max p - max q > alpha D_TV, bool [..]."""
        return summary["verifier_max"] - summary["drafter_max"] > self.alpha * summary["tv"]


@register
@dataclass(frozen=True)
class OptLog(PositionRule):
    """Defer iff H(q) > H(p) + alpha D_TV(p, q); alpha is any finite number, none is lossless."""

    name: ClassVar[str] = "opt_log"
    dial: ClassVar[Dial] = Dial("alpha", -5.0, 5.0, lossless=None, drafter=None, unbounded=True)
    needs: ClassVar[frozenset[str]] = frozenset({"drafter_entropy", "verifier_entropy", "tv"})
    reads_drafter_confidence: ClassVar[bool] = True
    plug_in: ClassVar[bool] = True
    dial_is_price: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 0.2

    def defer(self, summary: Summary) -> Tensor:
        """H(q) - H(p) > alpha D_TV, bool [..]."""
        return summary["drafter_entropy"] - summary["verifier_entropy"] > self.alpha * summary["tv"]


@register
@dataclass(frozen=True)
class OptVerifier(PositionRule):
    """OPT decided with P := p: defer iff p(v_q) < max p - alpha D_TV(p, q). It trusts p, never q's
    confidence.

    At alpha = -1 it defers wherever D_TV > 0, and elsewhere keeping is the same distribution: lossless. Its regret is
    at most 2 max_v |P(v) - p(v)|.
    """

    name: ClassVar[str] = "opt_verifier"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 2.0, lossless=-1.0, drafter=None)
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_max", "verifier_at_drafter_argmax", "tv"})
    plug_in: ClassVar[bool] = True
    dial_is_price: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 0.2

    def defer(self, summary: Summary) -> Tensor:
        """p(v_p) - p(v_q) > alpha D_TV, bool [..]."""
        gap = summary["verifier_max"] - summary["verifier_at_drafter_argmax"]
        return gap > self.alpha * summary["tv"]


@register
@dataclass(frozen=True)
class BiLD(PositionRule):
    """BiLD* of the paper's Table 3: defer iff D(q, p) > alpha, executed speculatively.

    Which D the paper used is not known, so that both are offered: ``"cross_entropy"`` (-sum p log q, nats,
    alpha in 0..20) and ``"tv"`` (D_TV of the sampling distributions, alpha in 0..1). Either is 0 only where the
    distributions agree.
    """

    name: ClassVar[str] = "bild"
    dial = Dial("alpha", 0.0, MOST_NATS, lossless=0.0, drafter=None, sweep=(0.0, 8.0))
    needs = frozenset({"cross_entropy"})
    reads_drafter_confidence: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    alpha: float = 0.5
    discrepancy: str = "cross_entropy"

    def __post_init__(self) -> None:
        if self.discrepancy not in ("cross_entropy", "tv"):
            raise InputError(f"rule bild: discrepancy is {self.discrepancy!r}; use 'cross_entropy' or 'tv'")
        if self.discrepancy == "tv":
            object.__setattr__(self, "dial", Dial("alpha", 0.0, 1.0, lossless=0.0, drafter=1.0))
            object.__setattr__(self, "needs", frozenset({"tv"}))
        super().__post_init__()

    def defer(self, summary: Summary) -> Tensor:
        """D(q, p) > alpha, bool [..]."""
        return summary[self.discrepancy] > self.alpha


@register
@dataclass(frozen=True)
class Fuzzy(PositionRule):
    """Fuzzy speculative decoding (arXiv 2502.20704): keep iff JSD(p, q) < threshold (nats), else the exact
    check.

    JSD is at most log 2, so that 0.7 always keeps; nothing is below 0, so that 0 always defers.
    """

    name: ClassVar[str] = "fuzzy"
    dial: ClassVar[Dial] = Dial("threshold", 0.0, 0.7, lossless=0.0, drafter=0.7)
    needs: ClassVar[frozenset[str]] = frozenset({"js"})
    reads_drafter_confidence: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    threshold: float = 0.1

    def defer(self, summary: Summary) -> Tensor:
        """JSD(p, q) >= threshold, bool [..]."""
        return summary["js"] >= self.threshold


@register
@dataclass(frozen=True)
class JuDi(PositionRule):
    """JuDi (arXiv 2601.04766): keep iff KL(p||q) < threshold (nats) and max p <= confidence, else the exact check.

    As the authors' code has it: the verifier's distribution comes first in the divergence, and where the verifier is
    sure of its token nothing is relaxed. They decode greedily; what this does when sampling is ours. At threshold 0
    it always defers, since no divergence is below 0.
    """

    name: ClassVar[str] = "judi"
    dial: ClassVar[Dial] = Dial("threshold", 0.0, MOST_NATS, lossless=0.0, drafter=None, sweep=(0.0, 4.0))
    needs: ClassVar[frozenset[str]] = frozenset({"kl", "verifier_max"})
    reads_drafter_confidence: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 1

    threshold: float = 0.5
    confidence: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.confidence <= 1:
            raise InputError(
                f"rule judi: confidence is {self.confidence}; allowed: 0 (never keeps) to 1 (looks at KL alone)"
            )

    def defer(self, summary: Summary) -> Tensor:
        """KL(p||q) >= threshold or max p > confidence, bool [..]."""
        return (summary["kl"] >= self.threshold) | (summary["verifier_max"] > self.confidence)


@register
@dataclass(frozen=True)
class Lossless(PositionRule):
    """Speculative decoding (Leviathan et al. 2023): every drafted token is checked; the output distribution is p."""

    name: ClassVar[str] = "lossless"

    @property
    def is_lossless(self) -> bool:
        """True: every drafted token is checked."""
        return True

    def defer(self, summary: Summary) -> Tensor:
        """True everywhere, bool [..]."""
        return summary.full(True)


@register
@dataclass(frozen=True)
class VerifierOnly(Lossless):
    """The verifier alone: never drafts. Its distribution is p, as lossless."""

    name: ClassVar[str] = "verifier_only"
    drafts: ClassVar[bool] = False


@register
@dataclass(frozen=True)
class DrafterOnly(PositionRule):
    """The drafter alone; a drafted token that the verifier's processing forbids is replaced."""

    name: ClassVar[str] = "drafter_only"

    def defer(self, summary: Summary) -> Tensor:
        """False everywhere, bool [..]."""
        return summary.full(False)
