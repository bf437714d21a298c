"""Heads as rules: the token rule of a truth head, and what ``--rules`` on the command line means."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.truth import TruthHead
from deferral_train.rules import make_rule
from deferral_train.rules.base import Dial, Rule, TokenRule
from deferral_train.rules.learned import LearnedRule
from deferral_train.rules.summary import Summary

# P^(v_p) comes by two ways, from the summary and from log p, log q; rounding must not break the tie for v_p.
TIE = 1e-6


@dataclass(frozen=True)
class LearnedTokenRule(TokenRule):
    """Keep v where value - P^(v) <= alpha * price(v): equation (12) with a learned P^ in place of P.

    Rejecting v leaves the emission to the verifier, which is worth ``value``
    (:meth:`TruthHead.verifier_value`). With ``priced`` a deferred token costs what it risks, price(v) =
    max(0, 1 - p(v)/q(v)), the probability of its rejection under lossless execution, whose mean over v ~ q
    is D_TV: the token-wise form of equation (9), an extension of ours. Without, price is 1, as in the paper
    and as greedy decoding wants it.
    """

    head: TruthHead
    alpha: float = 0.0
    priced: bool = False

    name: ClassVar[str] = "learned_token"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=None, drafter=None, unbounded=True)
    reads_drafter_confidence: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.head.features)

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        value = self.head.verifier_value(summary).unsqueeze(-1)
        loss = value - self.head.truth(drafter_logprobs, verifier_logprobs, summary)
        loss = loss - TIE
        if not self.priced:
            return loss <= self.alpha
        price = 1 - (verifier_logprobs - drafter_logprobs).nan_to_num(nan=0.0).exp()
        return loss <= self.alpha * price.clamp(0, 1)

    def estimated_gap(self, summary: Summary) -> Tensor:
        """P^(v_p) - P^(v_q) at each position, expected token errors."""
        return self.head.gap(summary)

    @property
    def gap_needs(self) -> frozenset[str]:
        return self.needs


def learned_rule(
    head: DeferralHead, alpha: float | None = None, *, tokenwise: bool | None = None, priced: bool = False
) -> Rule:
    """The rule that a head serves, at ``alpha`` or at the operating point stored in the head.

    A token head gives a token rule unless ``tokenwise`` is False; a truth mixture gives one if it is True.
    """
    if alpha is None:
        alpha = head.metadata.get("alpha")
    if alpha is None:
        raise InputError("this head has no chosen alpha; give one, e.g. learned:head=FOLDER,alpha=0.1")
    if tokenwise is None:
        tokenwise = head.head_type == "token"
    if not tokenwise:
        return LearnedRule(head=head, alpha=float(alpha))
    if not isinstance(head, TruthHead):
        raise InputError(
            f"a {head.head_type} head has no estimate per token; use a token or truth_mixture head"
        )
    return LearnedTokenRule(head=head, alpha=float(alpha), priced=priced)


def rule_from_spec(spec: str, typed: Collection[str] = ()) -> Rule:
    """A rule from text: ``opt``, ``opt:alpha=0.2``, ``my_pkg.mine:MyRule:alpha=1``,
    ``learned:head=FOLDER,alpha=0.1``.

    ``learned`` takes ``head`` (folder or hub id), ``alpha`` (default: stored in the head), ``tokenwise``
    and ``priced``.

    Args:
        spec: the rule. It may have been read from a file.
        typed: specs that the user typed, on the command line or in their own config. ``module:Class`` is imported
            where one of these names it and refused otherwise, so that no file can name code to import.
    """
    name, parameters = parse_spec(spec)
    if name != "learned":
        allowed = ":" in name and name in {parse_spec(text)[0] for text in typed}
        return make_rule(name, allow_import=allowed, **parameters)
    unknown = sorted(set(parameters) - {"head", "alpha", "tokenwise", "priced"})
    if unknown or "head" not in parameters:
        problem = f"unknown parameter {unknown[0]!r}" if unknown else "no head"
        raise InputError(
            f"rule {spec!r}: {problem}; write learned:head=FOLDER,alpha=0.1[,tokenwise=true,priced=true]"
        )
    head = DeferralHead.from_pretrained(str(parameters["head"]))
    chosen = {key: parameters[key] for key in ("tokenwise", "priced") if key in parameters}
    return learned_rule(head, parameters.get("alpha"), **chosen)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """``name[:key=value,...]`` into the name (which may hold a colon: module:Class) and typed parameters."""
    head, colon, tail = spec.rpartition(":") if "=" in spec.rpartition(":")[2] else (spec, "", "")
    if not colon and "=" in spec:
        raise InputError(
            f"rule {spec!r} has parameters but no name; write name:key=value, e.g. opt:alpha=0.2"
        )
    if "=" in head:  # a value held a colon, as a path with a drive or a hub address may
        head, _, tail = spec.partition(":")
    parameters = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InputError(f"rule {spec!r}: {item!r} is no key=value")
        parameters[key.strip()] = _value(value.strip())
    return head.strip(), parameters


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
