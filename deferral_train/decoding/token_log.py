"""Records both models' likeliest tokens beside every emitted one (``decode --log-tokens``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.block import VerifiedBlock
from deferral_train.decoding.proposing import Draft
from deferral_train.decoding.state import DecodingState
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.summary import Summary


class TokenLog:
    """Per row and emitted token: both models' top candidates, estimated gap, D_TV and the decision.

    Args:
        rows: rows of the call.
        top: candidates per model.
    """

    def __init__(self, rows: int, top: int = 5) -> None:
        self.top = top
        self.rows: list[list[dict[str, Any]]] = [[] for _ in range(rows)]

    def block(self, state: DecodingState, draft: Draft, decision: Tensor, verified: VerifiedBlock) -> None:
        """Take in a verified block; ``decision`` [B, T+1, V] are the verifier's decision logits."""
        depth = draft.tokens.shape[1]
        verifier = _candidates(decision, self.top)
        drafter = _candidates(draft.logits[:, :depth], self.top) if depth else None
        gaps, distances = self._gap_and_tv(state, draft, decision) if depth else ([], [])
        drafted = draft.tokens.tolist()
        for place, row in enumerate(state.tokens.rows):
            for step in range(len(verified.emitted[place])):
                entry: dict[str, Any] = {"verifier_top": verifier[place][step]}
                if drafter is not None and step < verified.proposed[place]:
                    entry |= {
                        "drafted": drafted[place][step],
                        "drafter_top": drafter[place][step],
                        "gap": _finite(gaps[place][step], 6),
                        "tv": _finite(distances[place][step], 6),
                        "deferred": verified.deferred[place][step],
                    }
                self.rows[row].append(entry)

    def _gap_and_tv(
        self, state: DecodingState, draft: Draft, decision: Tensor
    ) -> tuple[list[list[float]], list[list[float]]]:
        rule, depth = state.rule, draft.tokens.shape[1]
        distributions = Distributions.of(
            draft.logits[:, :depth], decision[:, :depth], state.distributions.temperature
        )
        context = state.context(draft)
        if context is not None:
            context = Summary({name: context[name][:, :depth] for name in context.names})
        summary = rule.read(distributions, draft.tokens, context, rule.gap_needs | {"tv"})
        gap = rule.estimated_gap(summary)
        return gap.tolist(), summary["tv"].tolist()

    def of(self, row: int, emitted: int) -> list[dict[str, Any]]:
        """The entries of the tokens that row ``row`` really emitted."""
        return self.rows[row][:emitted]


def _finite(value: float, digits: int) -> float | None:
    """A number as JSON has it: None for the log probability of a token that is forbidden."""
    return round(value, digits) if math.isfinite(value) else None


def _candidates(logits: Tensor, top: int) -> list[list[list[list[float | None]]]]:
    """Top ids and log probabilities [B, T, k, 2] as plain lists."""
    values, ids = torch.log_softmax(logits, dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
    return [
        [[[int(i), _finite(v, 4)] for i, v in zip(*pair)] for pair in zip(row_ids, row_values)]
        for row_ids, row_values in zip(ids.tolist(), values.tolist())
    ]
