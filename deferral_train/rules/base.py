"""What a rule is: a dial, the summary fields it needs, and one of three questions.

A position rule answers "defer?", a token rule "keep this token?", a law rule gives the target law itself. The
target law of all three is derived here, once. Decisions read the laws before temperature and truncation;
sampling reads the laws after. A token whose processed verifier logit is -inf is never emitted, whatever a
rule keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.emission import keep_law, onto_support
from deferral_train.rules.laws import Laws, gather_token, one_hot
from deferral_train.rules.summary import CONTEXT_FIELDS, TOKEN_FIELDS, Summary, summarize_laws


@dataclass(frozen=True)
class Dial:
    """The one parameter that trades quality for speed.

    Attributes:
        parameter: its name in the rule.
        low, high: the range; swept by `grid`, and enforced unless `unbounded`.
        lossless: the value at which execution is exactly lossless; None where there is none.
        drafter: the value that always keeps the drafter (within the verifier's support); None where none.
        unbounded: the rule takes any finite value, and low..high is only what a sweep covers.
    """

    parameter: str
    low: float
    high: float
    lossless: float | None
    drafter: float | None
    unbounded: bool = False

    def grid(self, n: int) -> list[float]:
        """`n` evenly spaced values from low to high."""
        if n < 1:
            raise InputError(f"grid of {self.parameter}: n is {n}; use at least 1")
        if n == 1:
            return [self.low]
        return [self.low + (self.high - self.low) * i / (n - 1) for i in range(n - 1)] + [self.high]

    def check(self, rule: str, value: float) -> None:
        """Refuse a value that is not finite, or outside the range, naming the rule."""
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not finite or (not self.unbounded and not self.low <= value <= self.high):
            allowed = "any finite number" if self.unbounded else f"{self.low:g} to {self.high:g}"
            raise InputError(f"rule {rule}: {self.parameter} is {value}; allowed: {allowed}")


@dataclass(frozen=True)
class Step:
    """What becomes of drafted tokens at positions [..].

    Attributes:
        deferred: bool [..], the decision (token rule: drafted token not kept; law rule: held to the exact check or a
            stricter one).
        kept: bool [..], the drafted token stands by the rule's leave rather than by the exact check.
        gap: [..], what `Rule.estimated_gap` says, where the decision was made from it; else None.
        target: above temperature 0 the probabilities [.., V] that the drafted token is checked and corrected against;
            at temperature 0 the token [..] that is emitted unless the drafted one is kept. None: the verifier's.
    """

    deferred: Tensor
    kept: Tensor
    target: Tensor | None
    gap: Tensor | None = None


@dataclass(
    frozen=True, eq=False
)  # a rule with a head is equal to itself alone; this comparison would be inherited
class Rule:
    """A deferral rule. Subclass `PositionRule`, `TokenRule` or `LawRule`.

    Attributes:
        name: what users type.
        dial: its dial, or None.
        needs: summary fields that the decision reads.
        stage: ``"draft"`` where only the drafter is read, else ``"verify"``.
        reads_drafter_confidence: refuses proposals that come without a law (one-hot q).
        drafts: False for a rule that never drafts.
    """

    name: ClassVar[str] = ""
    dial: ClassVar[Dial | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    stage: ClassVar[str] = "verify"
    reads_drafter_confidence: ClassVar[bool] = False
    drafts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dial is not None:
            self.dial.check(self.name, getattr(self, self.dial.parameter))

    def with_dial(self, value: float) -> Self:
        """The same rule at another value of its dial."""
        if self.dial is None:
            raise InputError(f"rule {self.name} has no dial; it takes no value {value}")
        return replace(self, **{self.dial.parameter: value})

    @property
    def dial_value(self) -> float | None:
        """The current value of the dial."""
        return None if self.dial is None else getattr(self, self.dial.parameter)

    @property
    def is_lossless(self) -> bool:
        """Whether the dial stands at its lossless end, so that execution is exactly lossless."""
        return (
            self.dial is not None and self.dial.lossless is not None and self.dial_value == self.dial.lossless
        )

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
        """pi, the law of the token that a drafted position emits.

        Args:
            drafter_logits, verifier_logits: decision logits [.., V].
            temperature: of the sampling laws; 0 is greedy.
            drafter_sampling_logits, verifier_sampling_logits: logits after temperature and truncation.
            context: summary fields that logits do not give (hidden states, positions), leading shape [..].

        Returns:
            Probabilities [.., V], float32 or float64 as given.

        Raises:
            InputError: shapes or vocabularies that differ, NaN or infinite logits, a missing context field;
                the message names the rule.
        """
        with named(self):
            laws = Laws.of(
                drafter_logits,
                verifier_logits,
                temperature,
                drafter_sampling_logits,
                verifier_sampling_logits,
            )
            laws.check()
            return self.law_from(laws, self.read(laws, context=context))

    def read(
        self,
        laws: Laws,
        token: Tensor | None = None,
        context: Summary | None = None,
        extra: frozenset[str] = frozenset(),
    ) -> Summary:
        """The summary that this rule's decision needs (and `extra` fields), from laws and context."""
        wanted = (self.needs | extra) if not self.is_lossless else extra
        absent = (wanted & CONTEXT_FIELDS) - set(context.names if context is not None else ())
        if absent:
            raise InputError(f"context lacks {', '.join(sorted(absent))}; pass context=Summary(...) with it")
        computed = wanted - CONTEXT_FIELDS
        if token is None:
            computed = computed - TOKEN_FIELDS
        columns = summarize_laws(laws, computed, token)
        given = wanted & CONTEXT_FIELDS
        if context is None or not given:
            return columns
        return columns.with_fields({name: context[name] for name in given})

    def law_from(self, laws: Laws, summary: Summary) -> Tensor:
        """pi [.., V] from laws and the summary it needs; the verifier's law at the lossless end."""
        if self.is_lossless:
            return laws.p
        return self._law(laws, summary)

    def step_law(self, laws: Laws, summary: Summary, token: Tensor) -> Tensor:
        """The distribution [.., V] that a drafted token [..] is checked and corrected against.

        The target, except for rules whose check depends on which token was drafted (cactus, judge).
        """
        return laws.p if self.is_lossless else self._step_law(laws, summary, token)

    def step(self, laws: Laws, summary: Summary, token: Tensor) -> Step:
        """What becomes of drafted tokens [..] under this rule; `summary` holds its needs and ``token``."""
        raise NotImplementedError

    def _step_law(self, laws: Laws, summary: Summary, token: Tensor) -> Tensor:
        return self._law(laws, summary)

    def _law(self, laws: Laws, summary: Summary) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PositionRule(Rule):
    """Answers "defer?" once per position. pi = q where it keeps, p where it defers: T_delta, equation (6)."""

    def defer(self, summary: Summary) -> Tensor:
        """True where the position is left to the verifier, bool [..]."""
        raise NotImplementedError

    def step(self, laws: Laws, summary: Summary, token: Tensor) -> Step:
        """The drafter's distribution where it keeps, the verifier's where it defers."""
        return self._decided(self.defer(summary), laws, token)

    def _decided(self, deferred: Tensor, laws: Laws, token: Tensor, gap: Tensor | None = None) -> Step:
        deferred = deferred.expand(token.shape)
        kept = laws.allows(token) > deferred
        return Step(deferred, kept, None if laws.greedy else self._choose(laws, deferred), gap)

    def _law(self, laws: Laws, summary: Summary) -> Tensor:
        return self._choose(laws, self.defer(summary))

    def _choose(self, laws: Laws, deferred: Tensor) -> Tensor:
        return torch.where(deferred.unsqueeze(-1), laws.p, onto_support(laws.q, laws.p, laws.support))


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
            drafter_logprobs, verifier_logprobs: log q and log p of the candidates (decision laws) [.., K];
                the whole vocabulary or any part of it.
            summary: fields in `needs`, leading shape [..].
        """
        raise NotImplementedError

    def step(self, laws: Laws, summary: Summary, token: Tensor) -> Step:
        """A kept token stands; any other is checked against pi_Token, for which every token is asked."""
        if laws.greedy:
            asked = [gather_token(model(laws.logprobs), token) for model in (laws.drafter, laws.verifier)]
            keep = self.keep(asked[0].unsqueeze(-1), asked[1].unsqueeze(-1), summary).squeeze(-1)
            return Step(~keep, keep & laws.allows(token), None)
        keeps = self.keep(laws.drafter_logprobs, laws.verifier_logprobs, summary)
        allowed = keeps & laws.support
        target = keep_law(laws.q, laws.p, allowed)
        return Step(~gather_token(keeps, token), gather_token(allowed, token), target)

    def _law(self, laws: Laws, summary: Summary) -> Tensor:
        keep = self.keep(laws.drafter_logprobs, laws.verifier_logprobs, summary)
        return keep_law(laws.q, laws.p, keep & laws.support)


@dataclass(frozen=True, eq=False)
class LawRule(Rule):
    """Gives its target law directly."""

    def law(self, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        """pi from the sampling laws q, p [.., V]; must sum to one."""
        raise NotImplementedError

    def greedy(self, laws: Laws, summary: Summary) -> Tensor | None:
        """The token [..] emitted at temperature 0; None where `law` of the one-hots is right as it is."""
        return None

    def step(self, laws: Laws, summary: Summary, token: Tensor) -> Step:
        """A token is kept where it stands with a higher probability than in the exact check."""
        if laws.greedy:
            emitted, exact = self._greedy_step(laws, summary, token), laws.verifier(laws.best)
            kept = (emitted == token) & (token != exact)
            return Step(~kept, kept, emitted)
        target = self._step_law(laws, summary, token)
        own, q, p = (gather_token(one, token) for one in (target, laws.q, laws.p))
        kept = torch.minimum(own, q) > p
        return Step(~kept, kept, target)

    def _greedy_step(self, laws: Laws, summary: Summary, token: Tensor) -> Tensor:
        emitted = self.greedy(laws, summary)
        if emitted is None:
            return self._step_law(laws, summary, token).argmax(dim=-1)
        return torch.where(laws.allows(emitted), emitted, laws.verifier(laws.best))

    def _law(self, laws: Laws, summary: Summary) -> Tensor:
        if laws.greedy:
            token = self.greedy(laws, summary)
            if token is not None:
                pi = one_hot(token, laws.decision.shape[-1], laws.decision.dtype)
                return onto_support(pi, laws.p, laws.support)
        return onto_support(self.law(laws.q, laws.p, summary), laws.p, laws.support)


class named:  # noqa: N801 - reads as a phrase: with named(rule)
    """Context manager that puts the rule's name before an InputError's message."""

    def __init__(self, rule: Rule) -> None:
        self.prefix = f"rule {rule.name}: "

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and not str(error).startswith("rule "):
            raise InputError(self.prefix + str(error)) from error
