"""Base classes of deferral rules: position, token, distribution and block rules, their dial and what they read.

A position rule answers "defer?", a token rule "keep this token?", a distribution rule gives the target distribution
itself. The target distribution of all three is derived here, once. A block rule looks at a whole drafted block, and has
none. Decisions read the distributions before temperature and truncation; sampling reads the distributions after. A
token whose processed verifier logit is -inf is never emitted, whatever a rule keeps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.distributions import Distributions, gather_token, one_hot
from deferral_train.rules.emission import keep_distribution, onto_support, rejection_mass
from deferral_train.rules.summary import CONTEXT_FIELDS, TOKEN_FIELDS, Summary, summarize_distributions
from deferral_train.rules.tails import (
    Candidates,
    Estimate,
    TailedDistributions,
    argmax_logprobs,
    between,
    exact,
    tailed,
    unbounded,
)


@dataclass(frozen=True)
class Dial:
    """The one parameter that trades quality for speed.

    Attributes:
        parameter: its name in the rule.
        low, high: the range; swept by `grid`, and enforced unless `unbounded`.
        lossless: the value at which execution is exactly lossless; None where there is none.
        drafter: the value that always keeps the drafter (within the verifier's support); None where none.
        unbounded: the rule takes any finite value, and low..high is only what a sweep covers.
        sweep: where the decisions of real pairs change, for a range that is wider by far; None for the whole range.
    """

    parameter: str
    low: float
    high: float
    lossless: float | None
    drafter: float | None
    unbounded: bool = False
    sweep: tuple[float, float] | None = None

    def grid(self, n: int) -> list[float]:
        """`n` evenly spaced values from low to high."""
        if n < 1:
            raise InputError(f"grid of {self.parameter}: n is {n}; use at least 1")
        if n == 1:
            return [self.low]
        return [self.low + (self.high - self.low) * i / (n - 1) for i in range(n - 1)] + [self.high]

    def swept(self, points: int) -> list[float]:
        """`points` values for a curve: evenly over `sweep`, and the ends of the range where these lie outside."""
        low, high = self.sweep or (self.low, self.high)
        ends = [] if self.unbounded else [v for v in (self.low, self.high) if not low <= v <= high]
        return replace(self, low=low, high=high).grid(max(1, points - len(ends))) + ends

    def check(self, rule: str, value: float) -> None:
        """Refuse a value that is not finite, or outside the range, naming the rule."""
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not finite or (not self.unbounded and not self.low <= value <= self.high):
            allowed = "any finite number" if self.unbounded else f"{self.low:g} to {self.high:g}"
            raise InputError(f"rule {rule}: {self.parameter} is {value}; allowed: {allowed}")


@dataclass(frozen=True)
class RuleStep:
    """A rule's decision on drafted tokens at positions [..], as verification uses it.

    Attributes:
        deferred: bool [..], the decision (token rule: drafted token not kept; distribution rule: held to the exact
            check or a stricter one).
        kept: bool [..], the drafted token stands by the rule's leave rather than by the exact check.
        probability: [..], above temperature 0 what a target gives to the drafted token; None without a target.
        target: above temperature 0 the probabilities [.., V] that the drafted token is checked and corrected against;
            at temperature 0 the token [..] that is emitted unless the drafted one is kept. None: the verifier's, and
            above temperature 0 in place of a kept token that may not be emitted the verifier's without a check.
        passes: bool [..], drafted tokens that stand, where the rule has found out itself (a block rule); else None.
    """

    deferred: Tensor
    kept: Tensor
    target: Tensor | None
    probability: Tensor | None = None
    passes: Tensor | None = None

    @classmethod
    def of_deferral(cls, deferred: Tensor, distributions: Distributions, token: Tensor) -> Self:
        """Of a position rule's answer: a kept token stands, a deferred one is checked against the verifier's."""
        deferred = deferred.expand(token.shape)
        return cls(deferred, distributions.allows(token) > deferred, None)


@dataclass(
    frozen=True, eq=False
)  # a rule with a head is equal to itself alone; this comparison would be inherited
class Rule:
    """A deferral rule. Subclass `PositionRule`, `TokenRule`, `LawRule` or `BlockRule`.

    Attributes:
        name: what users type.
        dial: its dial, or None.
        needs: summary fields that the decision reads.
        stage: ``"draft"`` where only the drafter is read, else ``"verify"``.
        reads_drafter_confidence: refuses proposals that come without a distribution (one-hot q).
        drafts: False for a rule that never drafts.
        dial_is_price: it is the price of a rejection in L_spec, equation (8), so that regret at it means something.
        plug_in: decides from the models' own confidence by a formula; heads are compared with these.
        dial_axes: axes behind the batch that the decision compares the dial over, 1 (positions) or 2 (and tokens), so
            that rows may each have their own (`with_dials`); None where its formula takes one number.
    """

    name: ClassVar[str] = ""
    dial: ClassVar[Dial | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    stage: ClassVar[str] = "verify"
    reads_drafter_confidence: ClassVar[bool] = False
    drafts: ClassVar[bool] = True
    dial_is_price: ClassVar[bool] = False
    plug_in: ClassVar[bool] = False
    dial_axes: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.dial is not None:
            self.dial.check(self.name, getattr(self, self.dial.parameter))

    def with_dial(self, value: float) -> Self:
        """The same rule at another value of its dial."""
        if self.dial is None:
            raise InputError(f"rule {self.name} has no dial; it takes no value {value}")
        return replace(self, **{self.dial.parameter: value})

    def with_dials(self, values: Tensor) -> Self:
        """The same rule with a dial for each row of a batch, [B]; values that `with_dial` takes, none of them lossless.

        Raises:
            InputError: a rule whose formula takes one number.
        """
        if self.dial is None or self.dial_axes is None:
            raise InputError(f"rule {self.name} takes one dial for all rows; verify rows that differ apart")
        rule = copy.copy(self)
        object.__setattr__(rule, self.dial.parameter, values.view(-1, *(1,) * self.dial_axes))
        return rule

    @property
    def dial_value(self) -> float | None:
        """The current value of the dial."""
        return None if self.dial is None else getattr(self, self.dial.parameter)

    @property
    def is_lossless(self) -> bool:
        """True where the dial stands at its lossless end, so that the output follows the verifier exactly."""
        if self.dial is None or self.dial.lossless is None:
            return False
        value: Any = self.dial_value
        return not isinstance(value, Tensor) and value == self.dial.lossless

    @property
    def checks_target(self) -> bool:
        """True where a drafted token is checked against the target; False where the check depends on the token."""
        return type(self)._step_distribution is Rule._step_distribution

    @property
    def gap_needs(self) -> frozenset[str]:
        """Summary fields that `estimated_gap` reads."""
        return frozenset({"verifier_max", "verifier_at_drafter_argmax"})

    def estimated_gap(self, summary: Summary) -> Tensor:
        """Estimated loss of keeping the drafter at a position, in expected token errors, [..].

        For rules without an estimate of their own: E_P[l(y,q) - l(y,p)] with zero_one loss and P := p, that
        is p(v_p) - p(v_q).
        """
        return summary["verifier_max"] - summary["verifier_at_drafter_argmax"]

    def target(
        self,
        drafter_logits: Tensor,
        verifier_logits: Tensor,
        temperature: float = 1.0,
        *,
        drafter_sampling_logits: Tensor | None = None,
        verifier_sampling_logits: Tensor | None = None,
        context: Summary | None = None,
    ) -> Tensor:
        """pi, the distribution of the token that a drafted position emits.

        Args:
            drafter_logits, verifier_logits: decision logits [.., V].
            temperature: of the sampling distributions; 0 is greedy.
            drafter_sampling_logits, verifier_sampling_logits: logits after temperature and truncation.
            context: summary fields that logits do not give (hidden states, positions), leading shape [..].

        Returns:
            Probabilities [.., V], float32 or float64 as given.

        Raises:
            InputError: shapes or vocabularies that differ, NaN or infinite logits, a missing context field;
                the message names the rule.
        """
        with named(self):
            distributions = Distributions.of(
                drafter_logits,
                verifier_logits,
                temperature,
                drafter_sampling_logits,
                verifier_sampling_logits,
            )
            distributions.check()
            return self.distribution_from(distributions, self.read(distributions, context=context))

    def read(
        self,
        distributions: Distributions,
        token: Tensor | None = None,
        context: Summary | None = None,
        extra: frozenset[str] = frozenset(),
    ) -> Summary:
        """The summary that this rule's decision needs (and `extra` fields), from distributions and context."""
        wanted = (self.needs | extra) if not self.is_lossless else extra
        absent = (wanted & CONTEXT_FIELDS) - set(context.names if context is not None else ())
        if absent:
            raise InputError(f"context lacks {', '.join(sorted(absent))}; pass context=Summary(...) with it")
        computed = wanted - CONTEXT_FIELDS
        if token is None:
            computed = computed - TOKEN_FIELDS
        columns = summarize_distributions(distributions, computed, token)
        given = wanted & CONTEXT_FIELDS
        if context is None or not given:
            return columns
        return columns.with_fields({name: context[name] for name in given})

    def distribution_from(self, distributions: Distributions, summary: Summary) -> Tensor:
        """pi [.., V] from distributions and the summary it needs; the verifier's distribution at the lossless end."""
        if self.is_lossless:
            return distributions.p
        return self._distribution(distributions, summary)

    def step_distribution(self, distributions: Distributions, summary: Summary, token: Tensor) -> Tensor:
        """The distribution [.., V] that a drafted token [..] is checked and corrected against.

        The target, except for rules whose check depends on which token was drafted (cactus, judge).
        """
        return distributions.p if self.is_lossless else self._step_distribution(distributions, summary, token)

    def step(self, distributions: Distributions, summary: Summary, token: Tensor) -> RuleStep:
        """The decision on drafted tokens [..]; `summary` holds the rule's needs and ``token``.

        Of a position rule verification asks `defer` and nothing else.
        """
        raise NotImplementedError

    def _step_distribution(self, distributions: Distributions, summary: Summary, token: Tensor) -> Tensor:
        return self._distribution(distributions, summary)

    def _distribution(self, distributions: Distributions, summary: Summary) -> Tensor:
        raise NotImplementedError

    # From logged positions [N]; asked through rules/offline.py, which says what each means. Not at the lossless end.

    def logged_deferral(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """Probability that a drafted token is deferred, [N]."""
        raise NotImplementedError

    def logged_rejection(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """Probability that a drafted token is rejected, [N]."""
        raise NotImplementedError

    def logged_distribution(self, summary: Summary, candidates: Candidates, temperature: float) -> Estimate:
        """The target on the candidates, [N, K]; at a temperature above 0."""
        raise NotImplementedError

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """The token emitted at temperature 0 and a bound (0, or 1 where an unlogged token could be it), [N]."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PositionRule(Rule):
    """Answers "defer?" once per position. pi = q where it keeps, p where it defers: T_delta, equation (6)."""

    def defer(self, summary: Summary) -> Tensor:
        """True where the position is left to the verifier, bool [..]."""
        raise NotImplementedError

    def defer_by_gap(self, summary: Summary, gap: Tensor) -> Tensor:
        """As `defer`, where `estimated_gap` is known already: a rule that decides by it need not estimate it again."""
        return self.defer(summary)

    def _distribution(self, distributions: Distributions, summary: Summary) -> Tensor:
        deferred = self.defer(summary).unsqueeze(-1)
        return torch.where(
            deferred, distributions.p, onto_support(distributions.q, distributions.p, distributions.support)
        )

    def logged_deferral(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """0 or 1, exact."""
        return exact(self.defer(summary).expand(summary.shape).double())

    def logged_rejection(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """r * tv (Lemma 3), exact."""
        return exact(self.defer(summary).expand(summary.shape) * summary["tv"].double())

    def logged_distribution(self, summary: Summary, candidates: Candidates, temperature: float) -> Estimate:
        """q or p."""
        summary, distributions, _ = tailed(summary, candidates, temperature, self.name)
        pi = torch.where(
            self.defer(summary).expand(summary.shape).unsqueeze(-1), distributions.p, distributions.q
        )
        return pi, distributions.slack.unsqueeze(-1) * pi

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """The verifier's argmax where it defers, else the drafter's."""
        drafter, verifier = summary["drafter_argmax"].long(), summary["verifier_argmax"].long()
        token = torch.where(self.defer(summary).expand(drafter.shape), verifier, drafter)
        return token, torch.zeros(drafter.shape, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class TokenRule(Rule):
    """Answers "keep this token?" for each candidate. pi is pi_Token, equation (11).

    Attributes:
        monotone: a token with a higher q(v) and a higher p(v) than a kept one is kept too.
    """

    monotone: ClassVar[bool] = False

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """True for candidates that are kept when drafted, bool [.., K].

        Args:
            drafter_logprobs, verifier_logprobs: log q and log p of the candidates (decision distributions) [.., K];
                the whole vocabulary or any part of it.
            summary: fields in `needs`, leading shape [..].
        """
        raise NotImplementedError

    def keep_tokens(
        self, tokens: Tensor | None, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary
    ) -> Tensor:
        """As :meth:`keep`; a rule that looks at which token it is overrides this.

        Args:
            tokens: ids of the candidates [.., K]; None is the whole vocabulary, in order.
        """
        return self.keep(drafter_logprobs, verifier_logprobs, summary)

    @property
    def alone(self) -> TokenRule:
        """The rule that decides each token by itself; differs where a rule weighs the tokens of a position together."""
        return self

    def step(self, distributions: Distributions, summary: Summary, token: Tensor) -> RuleStep:
        """A kept token stands; any other is checked against pi_Token, for which every token is asked."""
        if distributions.greedy:
            q, p = (one.unsqueeze(-1) for one in distributions.logprobs_of(token))
            keep = self.alone.keep_tokens(token.unsqueeze(-1), q, p, summary).squeeze(-1)
            p = p.squeeze(-1)
            allowed = p > -torch.inf if distributions.sampling is None else distributions.allows(token)
            return RuleStep(~keep, keep & allowed, None)
        keeps = self.keep_tokens(
            None, distributions.drafter_logprobs, distributions.verifier_logprobs, summary
        )
        allowed = keeps & distributions.support
        target = keep_distribution(distributions.q, distributions.p, allowed)
        kept, probability = gather_token(allowed, token), gather_token(target, token)
        return RuleStep(~gather_token(keeps, token), kept, target, probability)

    def _distribution(self, distributions: Distributions, summary: Summary) -> Tensor:
        keep = self.keep_tokens(
            None, distributions.drafter_logprobs, distributions.verifier_logprobs, summary
        )
        return keep_distribution(distributions.q, distributions.p, keep & distributions.support)

    def logged_deferral(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """The drafter's mass on tokens not kept."""
        if temperature == 0:
            return exact((~self._keeps_argmax(summary)).double())
        summary, distributions, candidates = tailed(summary, candidates, temperature, self.name)
        return between(*self._eta(summary, candidates, distributions), distributions.slack)

    def logged_rejection(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """Sum over tokens not kept of (q - eta p)+; bounds hold for monotone rules."""
        if temperature == 0:
            return rejects_greedily(self, summary, candidates)
        summary, distributions, candidates = tailed(summary, candidates, temperature, self.name)
        low_eta, high_eta = self._eta(summary, candidates, distributions)
        dropped = distributions.q * ~self._keeps(summary, candidates)

        def logged(eta: Tensor) -> Tensor:
            return (dropped - eta.unsqueeze(-1) * distributions.p).clamp(min=0.0).sum(dim=-1)

        tail_p, tail_q = (
            distributions.overlap + distributions.verifier_rest,
            distributions.overlap + distributions.excess,
        )
        least = torch.maximum(distributions.excess, tail_q - high_eta * tail_p)
        tail_low = torch.where(low_eta == high_eta, least, torch.zeros_like(least))
        tail_high = distributions.excess + (1 - low_eta).clamp(min=0.0) * distributions.overlap
        return between(logged(high_eta) + tail_low, logged(low_eta) + tail_high, 2 * distributions.slack)

    def logged_distribution(self, summary: Summary, candidates: Candidates, temperature: float) -> Estimate:
        """pi_Token."""
        summary, distributions, candidates = tailed(summary, candidates, temperature, self.name)
        low, high = (eta.unsqueeze(-1) for eta in self._eta(summary, candidates, distributions))
        kept = distributions.q * self._keeps(summary, candidates)
        return between(
            kept + low * distributions.p, kept + high * distributions.p, distributions.slack.unsqueeze(-1)
        )

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """The drafter's argmax where it is kept, else the verifier's."""
        drafter, verifier = summary["drafter_argmax"].long(), summary["verifier_argmax"].long()
        token = torch.where(self._keeps_argmax(summary), drafter, verifier)
        return token, torch.zeros(drafter.shape, dtype=torch.float64)

    def _keeps(self, summary: Summary, candidates: Candidates) -> Tensor:
        return self.keep_tokens(
            candidates.ids, candidates.drafter_logprobs, candidates.verifier_logprobs, summary
        )

    def _keeps_argmax(self, summary: Summary) -> Tensor:
        top = summary["verifier_max"].double().log().exp()  # as the candidate's own exp(log p) rounds
        summary = summary.with_fields({"verifier_max": top})
        argmax = summary["drafter_argmax"].long().unsqueeze(-1)
        return self.alone.keep_tokens(argmax, *argmax_logprobs(summary), summary).squeeze(-1)

    def _eta(
        self, summary: Summary, candidates: Candidates, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor]:
        """Lowest and highest eta = sum q over tokens not kept, [N]."""
        logged = (distributions.q * ~self._keeps(summary, candidates)).sum(dim=-1)
        tail = distributions.excess + distributions.overlap
        if not self.monotone:
            return logged, logged + tail
        # Where even the likeliest tail token would not be kept, none is.
        least = candidates.drafter_least.unsqueeze(-1), candidates.verifier_least.unsqueeze(-1)
        none_kept = ~self.keep(*least, summary).squeeze(-1)
        return torch.where(none_kept, logged + tail, logged), logged + tail


@dataclass(frozen=True, eq=False)
class LawRule(Rule):
    """Gives its target directly.

    Attributes:
        lossless_when_greedy: at temperature 0 it emits the verifier's token.
        within_support: `law` gives nothing to a token to which p gives nothing.
    """

    lossless_when_greedy: ClassVar[bool] = False
    within_support: ClassVar[bool] = False

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi from the sampling distributions q, p [.., V]; must sum to one."""
        raise NotImplementedError

    def greedy(self, distributions: Distributions, summary: Summary) -> Tensor | None:
        """The token [..] emitted at temperature 0; None where `law` of the one-hots is right as it is."""
        return distributions.verifier(distributions.best) if self.lossless_when_greedy else None

    def step(self, distributions: Distributions, summary: Summary, token: Tensor) -> RuleStep:
        """A token is kept where it stands with a higher probability than in the exact check."""
        if distributions.greedy and self.lossless_when_greedy:
            deferred = torch.ones_like(token, dtype=torch.bool)
            return RuleStep(deferred, ~deferred, None)
        if distributions.greedy:
            emitted, exact = (
                self._greedy_step(distributions, summary, token),
                distributions.verifier(distributions.best),
            )
            kept = (emitted == token) & (token != exact)
            return RuleStep(~kept, kept, emitted)
        target = self._step_distribution(distributions, summary, token)
        q, p = distributions.sampled_of(token)
        probability = gather_token(target, token)
        kept = torch.minimum(probability, q) > p
        return RuleStep(~kept, kept, target, probability)

    def _greedy_step(self, distributions: Distributions, summary: Summary, token: Tensor) -> Tensor:
        emitted = self.greedy(distributions, summary)
        if emitted is None:
            return self._step_distribution(distributions, summary, token).argmax(dim=-1)
        return torch.where(distributions.allows(emitted), emitted, distributions.verifier(distributions.best))

    def _distribution(self, distributions: Distributions, summary: Summary) -> Tensor:
        if distributions.greedy:
            token = self.greedy(distributions, summary)
            if token is not None:
                pi = one_hot(token, distributions.decision.shape[-1], distributions.decision.dtype)
                return onto_support(pi, distributions.p, distributions.support)
        pi = self.law(distributions.q, distributions.p, summary)
        return pi if self.within_support else onto_support(pi, distributions.p, distributions.support)

    def rejection_range(
        self, summary: Summary, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor] | None:
        """Lowest and highest D_TV(q, pi) that the unlogged tail allows, [N]; None where no bound is known."""
        return None

    def distribution_range(
        self, summary: Summary, distributions: TailedDistributions
    ) -> tuple[Tensor, Tensor] | None:
        """Lowest and highest pi on the candidates, [N, K] each; None where no bound is known."""
        return None

    def logged_deferral(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """The rejection rate over D_TV, the share of lossless rejections made: a distribution rule has no decision."""
        value, bound = self.logged_rejection(summary, candidates, temperature)
        tv = summary["tv"].double()
        share = torch.where(tv > 0, 1 / tv, torch.zeros_like(tv))
        return (value * share).clamp(max=1.0), bound * share

    def logged_rejection(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """D_TV(q, pi) within `rejection_range`."""
        if temperature == 0:
            return rejects_greedily(self, summary, candidates)
        summary, distributions, _ = tailed(summary, candidates, temperature, self.name)
        found = self.rejection_range(summary, distributions)
        if found is None:
            return unbounded(
                *(self.rejection(summary, *distributions.with_tail(way)) for way in (False, True))
            )
        return between(*found, 2 * distributions.slack)

    def logged_distribution(self, summary: Summary, candidates: Candidates, temperature: float) -> Estimate:
        """pi within `distribution_range`."""
        summary, distributions, _ = tailed(summary, candidates, temperature, self.name)
        found = self.distribution_range(summary, distributions)
        if found is None:
            return unbounded(*self._stand_ins(summary, distributions))
        return between(*found, distributions.slack.unsqueeze(-1))

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """The token that `law` gives of both models' one-hots.

        Raises:
            InputError: the rule has a greedy token of its own, which may read more than is logged.
        """
        drafter, verifier = summary["drafter_argmax"].long(), summary["verifier_argmax"].long()
        none = torch.zeros(drafter.shape, dtype=torch.float64)
        if self.lossless_when_greedy:
            return verifier, none
        if type(self).greedy is not LawRule.greedy:
            raise InputError(
                f"rule {self.name}: its greedy token is not known from logged positions; measure it with decode, or "
                "define greedy_token(summary, candidates)"
            )
        differ = drafter != verifier
        q = torch.stack([torch.ones_like(none), none], dim=-1)  # of v_q and v_p, two tokens or one
        p = torch.stack([~differ, differ], dim=-1).double()
        second = self.law(q, p, summary).argmax(dim=-1) == 1
        return torch.where(second, verifier, drafter), none

    def rejection(self, summary: Summary, q: Tensor, p: Tensor) -> Tensor:
        """D_TV(q, pi) of whole distributions, [..]."""
        return rejection_mass(self.law(q, p, summary), q)

    def _stand_ins(self, summary: Summary, distributions: TailedDistributions) -> tuple[Tensor, Tensor]:
        """pi on the candidates with the tail merged and dispersed, [N, K] each."""
        count = distributions.q.shape[-1]
        first, second = (
            self.law(*distributions.with_tail(way), summary)[..., :count] for way in (False, True)
        )
        return first, second


@dataclass(frozen=True, eq=False)
class BlockRule(Rule):
    """Judges a drafted block as a whole: which tokens stand although they failed the exact check.

    Every token is held to the exact check of lossless decoding first; `forgives` sees all of these verdicts and the
    distributions at every place, and lets some of those that failed stand. What it does not forgive is corrected as
    lossless decoding does. So the token emitted at a place depends on what was drafted behind it, and no target
    distribution says what such a rule emits there: whatever asks for one (scores from traces, the exact bonus, block
    verification, executions without blocks) refuses the rule by its name.
    """

    @property
    def checks_target(self) -> bool:
        """False: there is none."""
        return False

    @property
    def reach(self) -> int:
        """Places behind a token that `forgives` waits for: a draft must be longer, or nothing is ever forgiven."""
        return 0

    def forgives(self, passes: Tensor, distributions: Distributions, summary: Summary) -> Tensor:
        """True for drafted tokens that stand although they failed, bool [.., T]; of those that passed it is not read.

        Args:
            passes: tokens that pass the exact check, each by itself, bool [.., T]; False where nothing was drafted.
            distributions: of both models at the drafted places, [.., T, V].
            summary: fields in `needs` and ``token``, leading shape [.., T].
        """
        raise NotImplementedError

    def _distribution(self, distributions: Distributions, summary: Summary) -> Tensor:
        raise self._no_target("it has no distribution of one token; decode with it")

    def logged_deferral(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """Raises InputError: rows of a trace are places, not drafted blocks."""
        raise self._no_target("places of a trace do not say what it does; measure it with decode")

    def logged_rejection(
        self, summary: Summary, candidates: Candidates | None, temperature: float
    ) -> Estimate:
        """Raises InputError, as `logged_deferral`."""
        return self.logged_deferral(summary, candidates, temperature)

    def logged_distribution(self, summary: Summary, candidates: Candidates, temperature: float) -> Estimate:
        """Raises InputError, as `logged_deferral`."""
        return self.logged_deferral(summary, candidates, temperature)

    def greedy_token(self, summary: Summary, candidates: Candidates | None) -> Estimate:
        """Raises InputError, as `logged_deferral`."""
        return self.logged_deferral(summary, candidates, 0.0)

    def _no_target(self, remedy: str) -> InputError:
        return InputError(f"rule {self.name} judges drafted blocks as a whole: {remedy}")


def rejects_greedily(rule: Rule, summary: Summary, candidates: Candidates | None) -> Estimate:
    """1 where the drafter's argmax is replaced at temperature 0, [N]."""
    token, bound = rule.greedy_token(summary, candidates)
    return (token != summary["drafter_argmax"]).double(), bound


RULES: dict[str, type[Rule]] = {}
AnyRule = TypeVar("AnyRule", bound=type[Rule])


def register(rule: AnyRule) -> AnyRule:
    """Class decorator: makes a rule known by its name, to `make_rule`, the commands, the catalogue and the tests."""
    RULES[rule.name] = rule
    return rule


class named:  # noqa: N801 - reads as a phrase: with named(rule)
    """Context manager that puts the rule's name before an InputError's message."""

    def __init__(self, rule: Rule) -> None:
        self.prefix = f"rule {rule.name}: "

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and not str(error).startswith("rule "):
            raise InputError(self.prefix + str(error)) from error
