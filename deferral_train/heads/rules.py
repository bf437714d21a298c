"""Rules that use a head: the token rule of a truth head, and rules from text as ``--rules`` takes them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.own import import_head_class
from deferral_train.heads.rejected_pairs import read_rejected_pairs
from deferral_train.heads.token_gap import TokenGapHead
from deferral_train.heads.truth import TruthHead
from deferral_train.rules import make_rule
from deferral_train.rules.base import Dial, Rule, TokenRule
from deferral_train.rules.learned import Judge, LearnedRule
from deferral_train.rules.summary import Summary
from deferral_train.rules.token_gap import TokenGapRule, costly_tokens

# P^(v_p) comes by two ways, from the summary and from log p, log q; rounding must not break the tie for v_p.
TIE = 1e-6
HEAD_PARAMETERS = {
    "learned": ("head", "alpha", "tokenwise", "priced", "class"),
    "judge": ("head", "threshold", "class"),
}
FILES = ("head", "table")  # parameters that name a folder or a file


@dataclass(frozen=True)
class LearnedTokenRule(TokenRule):
    """Token rule that keeps drafted tokens by a head's estimate P^ of the true next-token distribution P.

    Plain: keep v where value - P^(v) <= alpha, equation (12), ``value`` being what the verifier's emission is worth
    (:meth:`TruthHead.verifier_value`); for greedy decoding, and as in the paper. ``priced``, for sampling: keep all but
    the set S that makes

        sum_{v in S} q(v) (A - P^(v)) - alpha * sum_{v in S} max(0, q(v) - D p(v))

    large, with A = sum P^ p and D = sum_{v in S} q(v): what E P^(emitted token) gains under pi_Token (equation 11),
    minus alpha per rejection, of which there are D_TV(q, pi_Token). An extension of ours: equation (9) for token
    rules. D couples the tokens, so S is sought by a few rounds, and taken only where it beats keeping all and none.
    """

    head: TruthHead
    alpha: float = 0.0
    priced: bool = False

    name: ClassVar[str] = "learned_token"
    dial: ClassVar[Dial] = Dial("alpha", -1.0, 1.0, lossless=None, drafter=None, unbounded=True)
    reads_drafter_confidence: ClassVar[bool] = True
    dial_axes: ClassVar[int | None] = 2

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.head.features)

    @property
    def alone(self) -> LearnedTokenRule:
        """The plain rule."""
        rule = copy.copy(self)  # whose dial may be one for each row
        object.__setattr__(rule, "priced", False)
        return rule

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """Bool [.., K]; with candidates fewer than V the sums run over these, as if they were all."""
        truth = self.head.truth(drafter_logprobs, verifier_logprobs, summary)
        if not self.priced:
            return self.head.verifier_value(summary).unsqueeze(-1) - truth - TIE <= self.alpha
        return ~dropped_set(drafter_logprobs.exp(), verifier_logprobs.exp(), truth, self.alpha)

    def estimated_gap(self, summary: Summary) -> Tensor:
        """P^(v_p) - P^(v_q) at each position, expected token errors."""
        return self.head.gap(summary)

    @property
    def gap_needs(self) -> frozenset[str]:
        return self.needs


def dropped_set(q: Tensor, p: Tensor, truth: Tensor, alpha: float) -> Tensor:
    """The set S of :class:`LearnedTokenRule`, bool [.., V], from q, p and P^ [.., V]."""
    return costly_tokens(q, p, q * ((truth * p).sum(-1, keepdim=True) - truth), alpha)


def learned_rule(
    head: DeferralHead,
    alpha: float | None = None,
    *,
    tokenwise: bool | None = None,
    priced: bool | None = None,
) -> Rule:
    """The rule that a head serves, at ``alpha`` or at the operating point stored in the head.

    A token head gives a token rule unless ``tokenwise`` is False; a truth mixture gives one if it is True; a token_gap
    head knows no other, and is ``priced`` unless told otherwise.
    """
    if head.dial != "alpha":
        raise InputError(
            "a judge head answers rule judge (judge:head=FOLDER,threshold=0.5) or, at stage 'draft', "
            "--stop acceptance:head=FOLDER"
        )
    if alpha is None:
        alpha = head.metadata.get("alpha")
    if alpha is None:
        raise InputError("this head has no chosen alpha; give one, e.g. learned:head=FOLDER,alpha=0.1")
    if tokenwise is None:
        tokenwise = head.tokenwise
    if isinstance(head, TokenGapHead):
        if not tokenwise:
            raise InputError("a token_gap head judges drafted tokens, not positions; leave tokenwise out")
        return TokenGapRule(head=head, alpha=float(alpha), priced=priced is not False)
    if not tokenwise:
        return LearnedRule(head=head, alpha=float(alpha))
    if not isinstance(head, TruthHead):
        raise InputError(
            f"a {head.head_type} head has no estimate per token; use a token or truth_mixture head"
        )
    return LearnedTokenRule(head=head, alpha=float(alpha), priced=bool(priced))


def judge_rule(head: DeferralHead, threshold: float | None = None) -> Rule:
    """The accept-or-exact rule of a judge head, at ``threshold`` or at the one stored in the head.

    Raises:
        InputError: another head, one of the draft stage, or no threshold.
    """
    if head.dial != "threshold":
        raise InputError(
            f"rule judge: a {head.head_type} head has no score; use learned:head=FOLDER,alpha=0.1"
        )
    threshold = head.metadata.get("threshold") if threshold is None else threshold
    if threshold is None:
        raise InputError("this head has no chosen threshold; give one, e.g. judge:head=FOLDER,threshold=0.5")
    return Judge(head=head, threshold=threshold)


def rule_from_spec(spec: str, typed: Collection[str] = ()) -> Rule:
    """A rule from text: ``opt``, ``opt:alpha=0.2``, ``my_pkg.mine:MyRule:alpha=1``,
    ``learned:head=FOLDER,alpha=0.1``.

    ``learned`` takes ``head`` (folder or hub id), ``alpha`` (default: stored in the head), ``tokenwise``
    and ``priced``; ``judge`` takes ``head`` and ``threshold`` (default: stored in the head). Both take ``class``, the
    head's class where it is the user's own. ``csd`` takes ``table``, a file of `deferral-train count-rejections`.

    Args:
        spec: the rule. It may have been read from a file.
        typed: specs that the user typed, on the command line or in their own config. ``module:Class`` and
            ``class=module.Class`` are imported where one of these names them and refused otherwise, so that no file
            can name code to import.
    """
    name, parameters = parse_spec(spec)
    if name == "csd" and "table" in parameters:
        parameters["table"] = read_rejected_pairs(str(parameters["table"]))
    if name not in HEAD_PARAMETERS:
        allowed = ":" in name and name in {parse_spec(text)[0] for text in typed}
        return make_rule(name, allow_import=allowed, **parameters)
    unknown = sorted(set(parameters) - set(HEAD_PARAMETERS[name]))
    if unknown or "head" not in parameters:
        problem = f"unknown parameter {unknown[0]!r}" if unknown else "no head"
        known = {
            "learned": "learned:head=FOLDER,alpha=0.1[,tokenwise=true,priced=true]",
            "judge": "judge:head=FOLDER,threshold=0.5",
        }
        raise InputError(f"rule {spec!r}: {problem}; write {known[name]}")
    for key in ("alpha", "threshold"):
        value = parameters.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value)
        ):
            raise InputError(f"rule {spec!r}: {key} is {value}; give a number, such as 0.1")
    head = _head_class(parameters, typed).from_pretrained(str(parameters["head"]))
    if name == "judge":
        return judge_rule(head, parameters.get("threshold"))
    chosen = {key: parameters[key] for key in ("tokenwise", "priced") if key in parameters}
    return learned_rule(head, parameters.get("alpha"), **chosen)


def _head_class(parameters: dict[str, Any], typed: Collection[str]) -> type[DeferralHead]:
    named = parameters.get("class")
    if named is None:
        return DeferralHead
    if named not in {parse_spec(text)[1].get("class") for text in typed}:
        raise InputError(
            f"class={named} would import code, and names from files never do; type the rule yourself"
        )
    return import_head_class(str(named))


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
        # A folder or a file stays a text, also where it is called 007 or true.
        parameters[key.strip()] = value.strip() if key.strip() in FILES else _value(value.strip())
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
