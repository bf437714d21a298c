"""What a rule decides about greedily drafted tokens on a CPU, with as few operations as will do.

Rules whose decision is arithmetic and comparison alone get arrays, all others the same numbers as tensors; what is not
known here is for scoring.py. B batch, T drafted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deferral_train.rules.base import PositionRule, Rule, TokenRule
from deferral_train.rules.learned import LearnedRule
from deferral_train.rules.numbers import FORMULAS, Numbers, Side, np
from deferral_train.rules.position import (
    BiLD,
    Chow,
    ChowLog,
    Diff,
    DiffLog,
    DrafterOnly,
    Opt,
    OptLog,
    OptVerifier,
)
from deferral_train.rules.summary import CONTEXT_FIELDS, Summary
from deferral_train.rules.token import TokenV1, TokenV2, TokenV3

Array = Any
# Of exactly these classes it is known that arrays do as well as tensors; whoever derives from them may use torch.
ARITHMETIC = frozenset({BiLD, Chow, ChowLog, Diff, DiffLog, DrafterOnly, Opt, OptLog, OptVerifier})
FROM_PROBABILITIES = frozenset({TokenV1, TokenV2, TokenV3})


def on_host(logits: Tensor) -> bool:
    """Whether logits can be read where they lie, as arrays."""
    return np is not None and logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64)


def decides(rule: Rule, drafter: Tensor, verifier: Tensor, extra: frozenset[str] = frozenset()) -> bool:
    """Whether `decide` works for this rule and these logits, with ``extra`` fields."""
    known = isinstance(rule, PositionRule | TokenRule) and _computed(rule, extra) <= FORMULAS.keys()
    return known and on_host(drafter) and drafter.dtype == verifier.dtype


def decide(
    rule: Rule,
    drafter: Tensor,
    verifier: Tensor,
    token: Tensor,
    context: Mapping[str, Tensor],
    extra: frozenset[str] = frozenset(),
) -> tuple[Tensor, Summary]:
    """Which drafted tokens a position or token rule defers, bool [B, T], and the summary that it read.

    Args:
        drafter, verifier: decision logits [B, T, V].
        token: [B, T].
        context: what `rule.needs` and ``extra`` name of the fields that logits do not give.
        extra: further fields of the summary.

    Raises:
        InputError: logits that are not finite.
    """
    numbers = Numbers(
        Side([drafter.detach().numpy()], token.shape[1], "drafter_logits"),
        Side([verifier.detach().numpy()], token.shape[1], "verifier_logits"),
        token.numpy().reshape(-1),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        summary = numbers.summary(_computed(rule, extra), tuple(token.shape))
        given = {name: context[name] for name in (rule.needs | extra) & CONTEXT_FIELDS}
        summary = summary.with_fields(given) if given else summary
        return _deferred(rule, numbers, summary).expand(token.shape), summary


def _computed(rule: Rule, extra: frozenset[str] = frozenset()) -> frozenset[str]:
    return (rule.needs | extra) - CONTEXT_FIELDS


def _deferred(rule: Rule, numbers: Numbers, summary: Summary) -> Tensor:
    """From tensors: for any position or token rule."""
    if isinstance(rule, PositionRule):
        return rule.defer(summary).expand(summary.shape)
    assert isinstance(rule, TokenRule)
    q, p = (
        torch.from_numpy(side.prob_above_zero(numbers.token).reshape(tuple(summary.shape)))
        for side in (numbers.drafter, numbers.verifier)
    )
    return ~rule.keep_probs(q.unsqueeze(-1), p.unsqueeze(-1), summary).squeeze(-1)


class GreedyBlocks:
    """A rule made ready for deciding greedy blocks, once per call: its head's weights must not change meanwhile."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.fields = _computed(rule)
        #: whether anything is known here of what the rule asks for
        self.knows = isinstance(rule, PositionRule | TokenRule) and self.fields <= FORMULAS.keys()
        kind = type(rule)
        self._probabilities = kind in FROM_PROBABILITIES
        self._arithmetic = kind in ARITHMETIC or (
            kind is LearnedRule and getattr(rule.head, "reads_numbers", False)  # type: ignore[attr-defined]
        )

    def deferred(
        self,
        drafter: Sequence[Tensor],
        verifier: Array,
        best: Array,
        token: Tensor,
        differing: list[int],
        context: Summary | None,
    ) -> Array | None:
        """Which drafted tokens are deferred at temperature 0, bool [B, T]; None where that cannot be told here.

        Args:
            drafter: decision logits in parts along the block, [B, k, V] each.
            verifier: decision logits [B, T+1, V].
            best: the verifier's argmaxes [B, T+1]; its logits there are finite.
            token: [B, T], each the drafter's argmax (as greedily drafted ones are).
            differing: positions b * T + t where that is not the verifier's argmax.
            context: fields that logits do not give, [B, T (or more), ..].

        Raises:
            InputError: the drafter's logits are not finite.
        """
        if not (self.knows and drafter and on_host(drafter[0])):
            return None
        parts, tokens = [part.numpy() for part in drafter], token.numpy()
        if parts[0].dtype != verifier.dtype:
            return None
        depth = tokens.shape[1]
        numbers = Numbers(
            Side(parts, depth, "drafter_logits", tokens),
            Side([verifier], depth, "verifier_logits", best[:, :depth]),
            tokens.reshape(-1),
            None if context is None else {n: _flat(context[n][:, :depth].numpy()) for n in context.names},
            differing,
        )
        return self._decide(numbers, tokens.shape).reshape(tokens.shape)

    def _decide(self, numbers: Numbers, shape: tuple[int, ...]) -> Array:
        rule: Any = self.rule
        if self._arithmetic:
            return rule.defer(numbers)
        if self._probabilities:
            q, p = numbers.drafter.prob(numbers.token), numbers.verifier.prob(numbers.token)
            return ~rule.keep_probs(q[:, None], p[:, None], numbers)[:, 0]
        return _deferred(rule, numbers, numbers.summary(self.fields | numbers.context.keys(), shape)).numpy()


def _flat(values: Array) -> Array:
    return values.reshape(-1, *values.shape[2:])
