"""Rules that decide by a learned estimator: any object with the protocol's attributes will do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import Dial, LawRule, PositionRule, RuleStep, register
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.emission import residual
from deferral_train.rules.summary import DRAFTER_CONFIDENCE_FIELDS, FIELDS, Summary
from deferral_train.rules.tails import Candidates, Estimate


@runtime_checkable
class GapEstimator(Protocol):
    """Protocol of the heads that `LearnedRule` accepts.

    `features`: summary fields it reads; `stage`: ``"draft"`` or ``"verify"``; `gap(summary)`: the estimate of
    E_P[l(y,q) - l(y,p)] [..], in units of the head's loss. At the draft stage also `tv(summary)`: the
    estimate of D_TV [..]. A head may define `defer(summary, alpha)` itself.
    """

    features: tuple[str, ...]
    stage: str

    def gap(self, summary: Summary) -> Tensor:
        """The estimated loss gap, [..]."""
        ...


@register
@dataclass(frozen=True, eq=False)
class LearnedRule(PositionRule):
    """Defer iff the head's estimated gap > alpha * D_TV: the optimal rule of Lemma 4, equation (9), with an
    estimate.

    A draft-stage head estimates D_TV too. No alpha is lossless: the estimate may be of any size.
    """

    name: ClassVar[str] = "learned"
    dial = Dial("alpha", -1.0, 1.0, lossless=None, drafter=None, unbounded=True)
    dial_is_price: ClassVar[bool] = True
    needs = frozenset({"tv"})
    stage = "verify"
    reads_drafter_confidence = False
    dial_axes = 1
    _own: ClassVar[Any] = None  # the head's own decision

    head: Any = None
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        features = frozenset(_checked_features("learned", self.head, "gap"))
        stage = getattr(self.head, "stage", "verify")
        if stage == "draft" and not callable(getattr(self.head, "tv", None)):
            raise InputError("rule learned: a draft-stage head must define tv(summary)")
        late = sorted(n for n in features if stage == "draft" and FIELDS[n].sees in ("verifier", "both"))
        if late:
            raise InputError(f"rule learned: a draft-stage head cannot read {', '.join(late)}")
        # Looked up once: a module's missing attribute is slow to miss.
        own = getattr(self.head, "defer", None)
        if getattr(self.head, "loss", None) == "log":  # nats, not token errors
            object.__setattr__(self, "dial", replace(type(self).dial, sweep=(-5.0, 5.0)))
        object.__setattr__(self, "_own", own if callable(own) else None)
        object.__setattr__(self, "dial_axes", None if callable(own) else 1)
        object.__setattr__(self, "stage", stage)
        object.__setattr__(self, "needs", features if stage == "draft" else features | {"tv"})
        object.__setattr__(self, "reads_drafter_confidence", bool(features & DRAFTER_CONFIDENCE_FIELDS))

    @property
    def gap_needs(self) -> frozenset[str]:
        """The head's features."""
        return frozenset(self.head.features)

    def estimated_gap(self, summary: Summary) -> Tensor:
        """The head's gap [..], in units of its loss."""
        return self.head.gap(summary)

    def defer(self, summary: Summary) -> Tensor:
        """gap > alpha D_TV, bool [..]; the head's own decision where it defines one."""
        if self._own is not None:
            return self._own(summary, self.alpha)
        return self._beyond_price(summary, self.head.gap(summary))

    def defer_by_gap(self, summary: Summary, gap: Tensor) -> Tensor:
        """As `defer`, from the head's gap; one that decides by itself is asked."""
        if self._own is not None or type(self).defer is not LearnedRule.defer:
            return self.defer(summary)
        return self._beyond_price(summary, gap)

    def _beyond_price(self, summary: Summary, gap: Tensor) -> Tensor:
        tv = self.head.tv(summary) if self.stage == "draft" else summary["tv"]
        return gap > self.alpha * tv


@register
@dataclass(frozen=True, eq=False)
class Judge(LawRule):
    """Judge decoding (arXiv 2501.19309, SelfJudge 2510.02329): accept a drafted token if the head approves it
    OR the exact check does.

    The head is an object with `features` (usually ``verifier_hidden_at_token``, the state of the drafted
    token) and `score(summary)` in 0..1 [..]; a token is approved iff its score > threshold. The residual is
    lossless decoding's, so that pi = q J + min(q, p)(1 - J) + R norm(max(0, p - q)), J the approval of each
    token and R = sum_v (1 - J(v)) max(0, q(v) - p(v)).

    Raises:
        InputError: no head with a score, or one of the draft stage.
    """

    name: ClassVar[str] = "judge"
    dial: ClassVar[Dial] = Dial("threshold", 0.0, 1.0, lossless=1.0, drafter=None)
    needs = frozenset()
    reads_drafter_confidence = False

    head: Any = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        features = frozenset(_checked_features("judge", self.head, "score"))
        if getattr(self.head, "stage", "verify") == "draft":
            raise InputError(
                "rule judge: head has stage 'draft' and predicts acceptance; use it to stop drafts "
                "(--stop acceptance:head=FOLDER), or fit one with stage 'verify'"
            )
        object.__setattr__(self, "needs", features)
        object.__setattr__(self, "reads_drafter_confidence", bool(features & DRAFTER_CONFIDENCE_FIELDS))

    def approved(self, summary: Summary) -> Tensor:
        """score > threshold, bool of the summary's leading shape."""
        return self.head.score(summary) > self.threshold

    def _distribution(self, distributions: Distributions, summary: Summary) -> Tensor:
        if "verifier_hidden_at_token" in self.needs:
            raise InputError(
                "its head reads verifier_hidden_at_token, known of the drafted token alone, so that the distribution "
                "of all tokens is not; measure it with decode"
            )
        approved = self._approval_of_all(distributions, summary) & distributions.support
        accepted = torch.where(approved, distributions.q, torch.minimum(distributions.q, distributions.p))
        rejected = (distributions.q - accepted).sum(dim=-1, keepdim=True)
        return accepted + rejected * residual(distributions.p, distributions.q)

    def _step_distribution(self, distributions: Distributions, summary: Summary, token: Tensor) -> Tensor:
        """q where the drafted token is approved (so that it stands), else p, [.., V]."""
        allowed = distributions.support.gather(-1, token.unsqueeze(-1))
        approved = self.approved(summary).unsqueeze(-1) & allowed
        return torch.where(approved, distributions.q, distributions.p)

    def step(self, distributions: Distributions, summary: Summary, token: Tensor) -> RuleStep:
        """At temperature 0 an approved token stands, any other gives way to the verifier's argmax."""
        if not distributions.greedy:
            return super().step(distributions, summary, token)
        kept = (
            self.approved(summary)
            & distributions.allows(token)
            & (token != distributions.verifier(distributions.best))
        )
        return RuleStep(~kept, kept, None)

    def logged_rejection(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """Raises InputError: the score may depend on the drafted token's own hidden state, so no bound is known."""
        raise InputError("rule judge judges drafted tokens one by one; measure it with decode")

    def logged_distribution(self, summary: Summary, candidates: Candidates, temperature: float) -> Estimate:
        """Raises InputError, as `logged_rejection`."""
        return self.logged_rejection(summary, candidates, temperature)

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """Raises InputError, as `logged_rejection`."""
        return self.logged_rejection(summary, candidates, 0.0)

    def _approval_of_all(self, distributions: Distributions, summary: Summary) -> Tensor:
        size = distributions.p.shape[-1]
        tokens = torch.arange(size, device=distributions.p.device).expand(distributions.p.shape)
        everyone = summary.expand_candidates(tokens)
        logprobs = {
            "drafter_logprob": distributions.drafter_logprobs,
            "verifier_logprob": distributions.verifier_logprobs,
        }
        needed = {name: value for name, value in logprobs.items() if name in self.needs}
        return self.approved(everyone.with_fields(needed))


def _checked_features(rule: str, head: Any, method: str) -> tuple[str, ...]:
    features = getattr(head, "features", None)
    if features is None or not callable(getattr(head, method, None)):
        raise InputError(
            f"rule {rule}: head is {type(head).__name__}; "
            f"pass an object with .features and .{method}(summary)"
        )
    unknown = [name for name in features if name not in FIELDS]
    if unknown:
        raise InputError(f"rule {rule}: the head reads unknown summary field(s) {', '.join(unknown)}")
    return tuple(features)
