"""What a rule says about drafted tokens: kept or not, and with which probability each is emitted.

Straightforward: whole laws [R, V]. The same numbers come from `rowwise.py` without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import LawRule, PositionRule, Rule, TokenRule
from deferral_train.rules.block import Block
from deferral_train.rules.laws import Laws, gather_token
from deferral_train.rules.summary import Summary


@dataclass(frozen=True)
class Scores:
    """Per drafted position, all [..].

    Attributes:
        deferred: the decision (token rule: drafted token not kept), bool.
        kept: the drafted token stands by the rule's leave rather than by the exact check, bool.
        ratio: probability that the drafted token is emitted.
        exact_ratio: the same under lossless execution.
        gap: estimated loss of keeping, or None where no limit asks for it.
    """

    deferred: Tensor
    kept: Tensor
    ratio: Tensor
    exact_ratio: Tensor
    gap: Tensor | None


def score_laws(
    rule: Rule, laws: Laws, token: Tensor, context: Summary | None, with_gap: bool, lazy: bool = False
) -> Scores:
    """Scores of drafted tokens [..] from laws [.., V].

    Args:
        lazy: leave the ratio of a token that a token rule does not keep at the exact ratio, which bounds it from
            above (eta <= 1); `refine` computes those that turn out to matter.
    """
    extra = rule.gap_needs if with_gap else frozenset()
    summary = rule.read(laws, token, context, extra)
    gap = rule.estimated_gap(summary) if with_gap else None
    p, q = gather_token(laws.p, token), gather_token(laws.q, token)
    if not laws.greedy and bool((q <= 0).any()):
        check_drawn(gather_token(laws.processed_drafter_logits, token))
    exact = pass_ratio(p, q)
    if rule.is_lossless:
        everywhere = torch.ones_like(exact, dtype=torch.bool)
        return Scores(everywhere, ~everywhere, exact, exact, gap)
    deferred = decide(rule, laws, summary, token)
    if deferred is None:
        ratio = pass_ratio(gather_token(rule.step_law(laws, summary, token), token), q)
        kept = ratio > exact
        return Scores(~kept, kept, ratio, exact, gap)
    kept = ~deferred & (gather_token(laws.processed_verifier_logits, token) > -torch.inf)
    # Off the support p(x) = 0, so that the exact ratio is 0 there too.
    ratio = torch.where(kept, torch.ones_like(exact), exact)
    if isinstance(rule, TokenRule) and not lazy and not bool(kept.all()):
        ratio = torch.where(
            kept, ratio, pass_ratio(gather_token(rule.step_law(laws, summary, token), token), q)
        )
    return Scores(deferred, kept, ratio, exact, gap)


def decide(rule: Rule, laws: Laws, summary: Summary, token: Tensor) -> Tensor | None:
    """The rule's decision on drafted tokens, bool [..]; None for a law rule, which has none."""
    if isinstance(rule, PositionRule):
        return rule.defer(summary).to(token.device).expand(token.shape)
    if isinstance(rule, TokenRule):
        drafter, verifier = laws.drafter_side.logprob(token), laws.verifier_side.logprob(token)
        return ~rule.keep(drafter.unsqueeze(-1), verifier.unsqueeze(-1), summary).squeeze(-1)
    if isinstance(rule, LawRule):
        return None
    raise InputError(f"rule {rule.name}: a rule must be a PositionRule, a TokenRule or a LawRule")


def pass_ratio(pi: Tensor, q: Tensor) -> Tensor:
    """min(1, pi(x)/q(x)); 0 where pi(x) = 0, also for a token that q never gives."""
    return torch.where(pi <= 0, torch.zeros_like(pi), torch.where(pi >= q, torch.ones_like(pi), pi / q))


def check_drawn(drafter_logit_at_token: Tensor) -> None:
    """Refuse drafted tokens that the drafter's sampling law forbids: they were drawn from another law."""
    masked = drafter_logit_at_token == -torch.inf
    if bool(masked.any()):
        raise InputError(
            f"{int(masked.sum())} drafted token(s) have probability 0 under the drafter's sampling law; "
            "pass the logits that they were drawn from"
        )


def score_block(rule: Rule, block: Block, with_gap: bool, uniform: Tensor | None) -> Scores:
    """Scores [B, T] of a block, chunk by chunk; positions that were not drafted read as not deferred, ratio 0."""
    lazy = uniform is not None
    if block.whole is not None:
        found = score_laws(rule, block.whole, block.drafted.flatten(), block.whole_context, with_gap, lazy)
        return _refined(rule, block, _shaped(found, block.drafted.shape), uniform)
    places = block.inside.nonzero(as_tuple=True)
    parts = [
        score_laws(rule, block.rows(*rows), block.drafted[rows], block.context_at(*rows), with_gap, lazy)
        for rows in block.chunks(*places)
    ]
    return _refined(rule, block, spread(parts, block, places), uniform)


def _shaped(scores: Scores, shape: torch.Size) -> Scores:
    """Scores [B * T] as [B, T]."""
    gap = None if scores.gap is None else scores.gap.to(torch.float64).reshape(shape)
    deferred, kept = scores.deferred.reshape(shape), scores.kept.reshape(shape)
    return Scores(deferred, kept, scores.ratio.reshape(shape), scores.exact_ratio.reshape(shape), gap)


def _refined(rule: Rule, block: Block, scores: Scores, uniform: Tensor | None) -> Scores:
    return (
        scores if uniform is None or not isinstance(rule, TokenRule) else refine(rule, block, scores, uniform)
    )


def refine(rule: Rule, block: Block, scores: Scores, uniform: Tensor) -> Scores:
    """The true ratio of tokens not kept, where the walk may reach them and the exact check would pass them.

    Where even the exact check fails, so does the rule's, which is stricter outside what it keeps.
    """
    if rule.is_lossless:
        return scores
    may_pass = uniform < scores.ratio
    reached = torch.cat([torch.ones_like(may_pass[:, :1]), may_pass[:, :-1]], dim=1).long().cumprod(dim=1) > 0
    for rows in block.chunks(*(reached & may_pass & ~scores.kept & block.inside).nonzero(as_tuple=True)):
        laws, token = block.rows(*rows), block.drafted[rows]
        law = rule.step_law(laws, rule.read(laws, token, block.context_at(*rows)), token)
        scores.ratio[rows] = pass_ratio(gather_token(law, token), gather_token(laws.q, token))
    return scores


def spread(parts: list[Scores], block: Block, places: tuple[Tensor, ...]) -> Scores:
    """Scores of rows, in chunks, written to their places in [B, T]."""

    def place(name: str, dtype: torch.dtype) -> Tensor:
        table = torch.zeros(block.drafted.shape, dtype=dtype, device=block.drafted.device)
        if parts:
            table[places] = torch.cat([getattr(part, name) for part in parts]).to(dtype)
        return table

    real = block.verifier_logits.dtype
    gap = None if not parts or parts[0].gap is None else place("gap", torch.float64)
    return Scores(
        place("deferred", torch.bool), place("kept", torch.bool), place("ratio", real),
        place("exact_ratio", real), gap,
    )  # fmt: skip
