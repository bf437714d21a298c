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
    """A rule made ready for deciding greedy blocks, once per call: its head's weights must not change meanwhile.

    Args:
        with_gap: whether :meth:`judged` will be asked for.
    """

    def __init__(self, rule: Rule, with_gap: bool = False) -> None:
        self.rule = rule
        self.fields = _computed(rule, rule.gap_needs if with_gap else frozenset())
        #: whether anything is known here of what the rule asks for
        self.knows = isinstance(rule, PositionRule | TokenRule) and self.fields <= FORMULAS.keys()
        kind = type(rule)
        self._probabilities = kind in FROM_PROBABILITIES
        self._arithmetic = kind in ARITHMETIC or (
            kind is LearnedRule and getattr(rule.head, "reads_numbers", False)  # type: ignore[attr-defined]
        )
        # The estimate of rules without one of their own: 0 where the argmaxes agree.
        self._common_gap = kind.estimated_gap is Rule.estimated_gap

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
        numbers = self._numbers(drafter, verifier, best, token.numpy(), differing, context)
        return None if numbers is None else self._decide(numbers, token.shape).reshape(token.shape)

    def judged(
        self,
        drafter: Sequence[Tensor],
        verifier: Array,
        best: Array,
        token: Array,
        differing: list[int],
        context: Mapping[str, Tensor] | None,
    ) -> tuple[Array, Array] | None:
        """As :meth:`deferred`, with the rule's estimated gap beside it [B, T]; ``token`` is an array, T columns of
        ``verifier`` and ``best`` are enough.
        """
        numbers = self._numbers(drafter, verifier, best, token, differing, context)
        if numbers is None:
            return None
        deferred, shape = self._decide(numbers, token.shape), token.shape
        return deferred.reshape(shape), self._gap(numbers, shape).reshape(shape)

    def _numbers(
        self,
        drafter: Sequence[Tensor],
        verifier: Array,
        best: Array,
        tokens: Array,
        differing: list[int],
        context: Mapping[str, Tensor] | None,
    ) -> Numbers | None:
        if not (self.knows and drafter and on_host(drafter[0])):
            return None
        parts, depth = [part.detach().numpy() for part in drafter], tokens.shape[1]
        if parts[0].dtype != verifier.dtype:
            return None
        given = (
            None if context is None else {name: _flat(context[name][:, :depth].numpy()) for name in context}
        )
        return Numbers(
            Side(parts, depth, "drafter_logits", tokens),
            Side([verifier], depth, "verifier_logits", best[:, :depth]),
            tokens.reshape(-1),
            given,
            differing,
        )

    def _decide(self, numbers: Numbers, shape: tuple[int, ...]) -> Array:
        rule: Any = self.rule
        if self._arithmetic:
            return rule.defer(numbers)
        if self._probabilities:
            q, p = numbers.drafter.prob(numbers.token), numbers.verifier.prob(numbers.token)
            return ~rule.keep_probs(q[:, None], p[:, None], numbers)[:, 0]
        return _deferred(rule, numbers, self._summary(numbers, shape)).numpy()

    def _gap(self, numbers: Numbers, shape: tuple[int, ...]) -> Array:
        if self._common_gap and not numbers.differing():
            return np.zeros(numbers.shape)
        rule: Any = self.rule
        if self._common_gap or (self._arithmetic and isinstance(rule, LearnedRule)):
            return rule.estimated_gap(numbers)
        return rule.estimated_gap(self._summary(numbers, shape)).expand(shape).numpy()

    def _summary(self, numbers: Numbers, shape: tuple[int, ...]) -> Summary:
        return numbers.summary(self.fields | numbers.context.keys(), shape)


def _flat(values: Array) -> Array:
    return values.reshape(-1, *values.shape[2:])
