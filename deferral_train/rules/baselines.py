"""Lossy baselines that give their target distribution directly, each with its own parameter.

All run by draft + accept + residual of their distribution (emission.py), which for `lossy`, `lenient`, `mentored` and
`ensemble` is the procedure of their authors. Distributions [.., V] are sampling distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deferral_train.rules.base import Dial, LawRule, RuleStep, register
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.emission import residual
from deferral_train.rules.floors import capped, clip_between, floor_for_cut, mentored_clip
from deferral_train.rules.summary import Summary
from deferral_train.rules.tails import Candidates, Estimate, TailedDistributions, needs_candidates


class _RejectsLessMerged(LawRule):
    """Bounds from logged candidates of rules that reject no more where tokens are merged into one."""

    def rejection_range(self, summary: Summary, distributions: TailedDistributions) -> tuple[Tensor, Tensor]:
        """D_TV(q, pi) [N] with a merged and a dispersed tail."""
        most = self.rejection(summary, *distributions.with_tail(dispersed=True))
        return torch.minimum(self.rejection(summary, *distributions.with_tail(dispersed=False)), most), most

    def distribution_range(
        self, summary: Summary, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor]:
        """Between a merged and a dispersed tail."""
        first, second = self._stand_ins(summary, distributions)
        return torch.minimum(first, second), torch.maximum(first, second)


@register
@dataclass(frozen=True)
class Lossy(_RejectsLessMerged):
    """Lossy speculative decoding: pi = max(min(q, p/(1-alpha)), p/beta), beta normalises (Lemma 2).

    beta is infinite where min(q, p/(1-alpha)) leaves no rejection mass. At temperature 0 it is lossless at
    every alpha. At alpha = 1 it keeps every token that the verifier gives any probability.
    """

    name: ClassVar[str] = "lossy"
    dial: ClassVar[Dial] = Dial("alpha", 0.0, 1.0, lossless=0.0, drafter=None)
    lossless_when_greedy: ClassVar[bool] = True
    within_support: ClassVar[bool] = True

    alpha: float = 0.2

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi [.., V]."""
        low = torch.minimum(q, capped(p, self.cap))
        floor = floor_for_cut(q, p, (q - low).sum(dim=-1, keepdim=True))
        return torch.maximum(low, p * floor)

    @property
    def cap(self) -> float:
        """1/(1 - alpha), infinite at alpha = 1."""
        return _inverse(1 - self.alpha)

    def distribution_range(
        self, summary: Summary, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor]:
        """More is cut and less is raised in a merged tail: the floor lies between these two."""
        cap = self.cap
        low_cut, high_cut = (cut.unsqueeze(-1) for cut in self.rejection_range(summary, distributions))
        low = floor_for_cut(*distributions.with_tail(dispersed=True), low_cut)
        high = floor_for_cut(*distributions.with_single_tail(), high_cut)
        return (
            clip_between(distributions.q, distributions.p, low, cap),
            clip_between(distributions.q, distributions.p, torch.maximum(low, high), cap),
        )


@register
@dataclass(frozen=True)
class Lenient(_RejectsLessMerged):
    """Lenient speculative decoding (Leviathan et al. 2023, A.5): accept min(1, p/((1-alpha) q)), beta = 1.

    The residual is max(0, p - q) as in lossless decoding, so that its distribution is
    pi = min(q, p/(1-alpha)) + R norm(max(0, p - q)), R the rejection mass. At temperature 0 it is lossless.
    """

    name: ClassVar[str] = "lenient"
    dial: ClassVar[Dial] = Dial("alpha", 0.0, 1.0, lossless=0.0, drafter=None)
    lossless_when_greedy: ClassVar[bool] = True
    within_support: ClassVar[bool] = True

    alpha: float = 0.2

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi [.., V]."""
        accepted = torch.minimum(q, capped(p, _inverse(1 - self.alpha)))
        rejected = (q - accepted).sum(dim=-1, keepdim=True)
        return accepted + rejected * residual(p, q)


@register
@dataclass(frozen=True)
class Mentored(LawRule):
    """Mentored decoding (V. Tran-Thien, 2023): the most acceptance with KL(p||pi) <= divergence (nats).

    pi = clip(q, p/beta, p/alpha) with alpha <= 1 <= beta found to full precision; q itself where KL(p||q) is
    within the limit.
    """

    name: ClassVar[str] = "mentored"
    dial: ClassVar[Dial] = Dial("divergence", 0.0, 5.0, lossless=0.0, drafter=None)
    lossless_when_greedy: ClassVar[bool] = True
    within_support: ClassVar[bool] = True

    divergence: float = 0.1

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi [.., V]."""
        cap, floor = mentored_clip(q, p, self.divergence)
        return clip_between(q, p, floor, cap)

    def rejection_range(self, summary: Summary, distributions: TailedDistributions) -> tuple[Tensor, Tensor]:
        """An optimum: a coarser pair never rejects more."""
        least = self.rejection(summary, *distributions.with_single_tail())
        return least, self.rejection(summary, *distributions.with_tail(dispersed=True))

    def distribution_range(
        self, summary: Summary, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor]:
        """Between q and p."""
        return torch.minimum(distributions.q, distributions.p), torch.maximum(
            distributions.q, distributions.p
        )


@register
@dataclass(frozen=True)
class Cactus(LawRule):
    """Cactus (arXiv 2604.04987): a drafted token x is checked against h_x.

    h_x(x) = min(1, p(x) + sqrt(2 delta p(x) (1 - p(x)))), the rest of p scaled to sum to one. The distribution checked
    depends on the drafted token; `law` is the distribution that all of it together emits.
    """

    name: ClassVar[str] = "cactus"
    dial: ClassVar[Dial] = Dial("delta", 0.0, 5.0, lossless=0.0, drafter=None)
    lossless_when_greedy: ClassVar[bool] = True
    within_support: ClassVar[bool] = True

    delta: float = 0.1

    def raised(self, p: Tensor) -> Tensor:
        """h_v(v) for every token v, [.., V]."""
        return (p + torch.sqrt((2 * self.delta * p * (1 - p)).clamp(min=0.0))).clamp(max=1.0)

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi(v) = min(q, h_v(v)) + sum_x (q(x) - h_x(x))+ norm(max(0, h_x - q))(v), [.., V].

        The residual of x is max(0, c_x p - q) with c_x = (1 - h_x(x))/(1 - p(x)), so that one sort by q/p
        serves every x: sum_x is p A - q B with suffix sums A, B over the x whose c_x exceeds q(v)/p(v).
        """
        raised = self.raised(p)
        rejected = (q - raised).clamp(min=0.0)
        scale = ((1 - raised) / torch.where(p < 1, 1 - p, torch.ones_like(p))).clamp(0.0, 1.0)
        ratio = torch.where(p > 0, q / p, torch.full_like(p, torch.inf))
        order = ratio.argsort(dim=-1)
        ratio_sorted = ratio.gather(-1, order)
        mass_p, mass_q = (_prefix(distribution.gather(-1, order)) for distribution in (p, q))
        count = torch.searchsorted(ratio_sorted, scale.contiguous())  # tokens with q/p < c_x
        normaliser = scale * mass_p.gather(-1, count) - mass_q.gather(-1, count)
        # The normaliser is at least q(x) - h_x(x), so that the weight is at most 1.
        share = torch.maximum(normaliser, rejected)
        weight = rejected / torch.where(rejected > 0, share, torch.ones_like(share))
        by_scale = scale.argsort(dim=-1)
        first = torch.searchsorted(scale.gather(-1, by_scale), ratio, right=True)
        weight_sorted, scale_sorted = weight.gather(-1, by_scale), scale.gather(-1, by_scale)
        of_p = _suffix(weight_sorted * scale_sorted).gather(-1, first)
        of_q = _suffix(weight_sorted).gather(-1, first)
        return torch.minimum(q, raised) + (p * of_p - q * of_q).clamp(min=0.0)

    def _step_distribution(self, distributions: Distributions, summary: Summary, token: Tensor) -> Tensor:
        """h_x for the drafted tokens x, [.., V]."""
        p, index = distributions.p, token.unsqueeze(-1)
        raised, own = self.raised(p).gather(-1, index), p.gather(-1, index)
        scale = torch.where(own < 1, (1 - raised) / (1 - own), torch.zeros_like(own))
        return (p * scale).scatter(-1, index, raised)

    def rejection_range(self, summary: Summary, distributions: TailedDistributions) -> tuple[Tensor, Tensor]:
        """In the tail no more than (q - p)+, and perhaps nothing: many small tokens may all be raised enough."""
        logged = (distributions.q - self.raised(distributions.p)).clamp(min=0.0).sum(dim=-1)
        return logged, logged + distributions.excess

    def distribution_range(
        self, summary: Summary, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor]:
        """At least what is accepted."""
        return torch.minimum(distributions.q, self.raised(distributions.p)), torch.ones_like(distributions.p)


@register
@dataclass(frozen=True)
class EARS(LawRule):
    """EARS (arXiv 2512.13194): accept with min(1, p/q + t), t = tolerance (1 - max p), and correct as lossless does.

    With A = min(q, p + t q), pi = A + R norm(max(0, p - q)), R = 1 - sum A. Published is u - t <= p/q for a uniform u,
    which also accepts tokens that the verifier's truncation has removed; here a token with p = 0 is never accepted. At
    temperature 0 max p is 1 and nothing is tolerated.
    """

    name: ClassVar[str] = "ears"
    dial: ClassVar[Dial] = Dial("tolerance", 0.0, 1.0, lossless=0.0, drafter=None)
    lossless_when_greedy: ClassVar[bool] = True
    within_support: ClassVar[bool] = True

    tolerance: float = 0.3

    def accepted(self, q: Tensor, p: Tensor) -> Tensor:
        """A, what is drafted and stands, [.., V]."""
        slack = self.tolerance * (1 - p.amax(dim=-1, keepdim=True))
        return torch.minimum(q, torch.addcmul(p, q, slack)) * (p > 0)

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi [.., V]."""
        accepted = self.accepted(q, p)
        rejected = (q - accepted).sum(dim=-1, keepdim=True)
        return accepted + rejected * residual(p, q)

    def rejection_range(self, summary: Summary, distributions: TailedDistributions) -> tuple[Tensor, Tensor]:
        """R: of the tail at most its excess (q - p)+, at least that less what t q tolerates there."""
        q, p = distributions.q, distributions.p
        logged = (q - self.accepted(q, p)).sum(dim=-1)
        tail = distributions.excess + distributions.overlap
        tolerated = self.tolerance * (1 - p.amax(dim=-1)) * tail
        return logged + (distributions.excess - tolerated).clamp(min=0.0), logged + distributions.excess

    def distribution_range(
        self, summary: Summary, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor]:
        """A, and between the least and the most that is rejected spread over (p - q)+."""
        q, p = distributions.q, distributions.p
        tv = ((q - p).clamp(min=0.0).sum(dim=-1) + distributions.excess).unsqueeze(-1)
        share = torch.where(tv > 0, (p - q).clamp(min=0.0) / tv, torch.zeros_like(p))
        low, high = (
            self.accepted(q, p) + one.unsqueeze(-1) * share
            for one in self.rejection_range(summary, distributions)
        )
        return low, high


@register
@dataclass(frozen=True)
class Ensemble(_RejectsLessMerged):
    """The fixed ensemble that transformers ships (`assistant_ensemble_weight`): pi = w p + (1 - w) q.

    At temperature 0 it emits the argmax of the mixture of the processed distributions.
    """

    name: ClassVar[str] = "ensemble"
    dial: ClassVar[Dial] = Dial("weight", 0.0, 1.0, lossless=1.0, drafter=0.0)
    reads_drafter_confidence: ClassVar[bool] = True

    weight: float = 0.5

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi [.., V]."""
        return self.weight * p + (1 - self.weight) * q

    def greedy(self, distributions: Distributions, summary: Summary) -> Tensor:
        """argmax of w p + (1 - w) q among tokens that may be emitted, [..]."""
        if self.weight == 0:
            return distributions.drafter(distributions.best)
        both = (
            distributions.probs
            if distributions.sampling is None
            else torch.softmax(distributions.sampling, dim=-1)
        )
        mixture = self.law(distributions.drafter(both), distributions.verifier(both), summary)
        return torch.where(distributions.support, mixture, -1.0).argmax(dim=-1)

    def _greedy_step(self, distributions: Distributions, summary: Summary, token: Tensor) -> Tensor:
        return (
            super()._greedy_step(distributions, summary, token)
            if self.weight == 0
            else self.greedy(distributions, summary)
        )

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """argmax of the mixture among the candidates; the bound is 1 where an unlogged token could have more."""
        drafter = summary["drafter_argmax"].long()
        if self.weight == 0:
            return drafter, torch.zeros(drafter.shape, dtype=torch.float64)
        found = needs_candidates(candidates, self.name)
        mixture = self.law(found.drafter_logprobs.exp(), found.verifier_logprobs.exp(), summary)
        top = mixture.amax(dim=-1, keepdim=True)
        tied = (mixture == top) & found.valid
        token = found.ids.masked_fill(~tied, torch.iinfo(torch.int64).max).amin(dim=-1)
        rest = self.law(found.drafter_least.exp(), found.verifier_least.exp(), summary)
        return token, (rest >= top.squeeze(-1)).double()


@register
@dataclass(frozen=True)
class Biased(_RejectsLessMerged):
    """Self-Speculative Biased Decoding (arXiv 2509.21740): P' = (1 - bias) p + bias * (mass at the draft).

    Over drafts from q its distribution is (1 - bias) p + bias q. At temperature 0 the draft stands iff
    p(v_q) >= max p - bias/(1 - bias), and always where it is the argmax.
    """

    name: ClassVar[str] = "biased"
    dial: ClassVar[Dial] = Dial("bias", 0.0, 1.0, lossless=0.0, drafter=1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_max", "verifier_at_drafter_argmax"})

    bias: float = 0.2

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi [.., V]."""
        return (1 - self.bias) * p + self.bias * q

    def greedy(self, distributions: Distributions, summary: Summary) -> Tensor:
        """v_q where the margin allows it, else v_p, [..]."""
        drafter, verifier = (
            distributions.drafter(distributions.best),
            distributions.verifier(distributions.best),
        )
        return torch.where(self.stands(summary), drafter, verifier)

    def step(self, distributions: Distributions, summary: Summary, token: Tensor) -> RuleStep:
        """At temperature 0 the draft is the drafter's argmax, which stands or gives way to the verifier's."""
        if not distributions.greedy:
            return super().step(distributions, summary, token)
        kept = (
            self.stands(summary)
            & distributions.allows(token)
            & (token != distributions.verifier(distributions.best))
        )
        return RuleStep(~kept, kept, None)

    def stands(self, summary: Summary) -> Tensor:
        """max p - p(v_q) <= bias/(1 - bias) and bias > 0: the draft stands at temperature 0, bool [..]."""
        margin = self.bias / (1 - self.bias) if self.bias < 1 else torch.inf
        gap = summary["verifier_max"] - summary["verifier_at_drafter_argmax"]
        return (gap <= margin) & (self.bias > 0)

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """v_q where the margin allows it, else v_p."""
        drafter, verifier = summary["drafter_argmax"].long(), summary["verifier_argmax"].long()
        token = torch.where(self.stands(summary), drafter, verifier)
        return token, torch.zeros(drafter.shape, dtype=torch.float64)


def _inverse(value: float) -> float:
    """1/value, infinite at 0."""
    return math.inf if value == 0 else 1 / value


def _prefix(values: Tensor) -> Tensor:
    """Sums of the first k values, k = 0..V, [.., V+1]."""
    return torch.nn.functional.pad(values.cumsum(dim=-1), (1, 0))


def _suffix(values: Tensor) -> Tensor:
    """Sums of the values from index k on, k = 0..V, [.., V+1]."""
    return torch.nn.functional.pad(values.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
