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
from deferral_train.rules.laws import Laws
from deferral_train.rules.summary import Summary, gather_token


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


def score_laws(rule: Rule, laws: Laws, token: Tensor, context: Summary | None, with_gap: bool) -> Scores:
    """Scores of drafted tokens [..] from whole laws [.., V]."""
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
    allowed = gather_token(laws.support, token)
    deferred = decide(rule, laws, summary, token)
    if deferred is None:
        ratio = pass_ratio(gather_token(rule.step_law(laws, summary, token), token), q)
        kept = ratio > exact
        return Scores(~kept, kept, ratio, exact, gap)
    kept = ~deferred & allowed
    ratio = pass_ratio(gather_token(rule.step_law(laws, summary, token), token), q)
    return Scores(deferred, kept, torch.where(kept, torch.ones_like(ratio), ratio), exact, gap)


def decide(rule: Rule, laws: Laws, summary: Summary, token: Tensor) -> Tensor | None:
    """The rule's decision on drafted tokens, bool [..]; None for a law rule, which has none."""
    if isinstance(rule, PositionRule):
        return rule.defer(summary).to(token.device).expand(token.shape)
    if isinstance(rule, TokenRule):
        drafter = gather_token(laws.drafter_logprobs, token).unsqueeze(-1)
        verifier = gather_token(laws.verifier_logprobs, token).unsqueeze(-1)
        return ~rule.keep(drafter, verifier, summary).squeeze(-1)
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


def score_block(rule: Rule, block: Block, with_gap: bool) -> Scores:
    """Scores [B, T] of a block, chunk by chunk; positions that were not drafted read as not deferred, ratio 0."""
    batch, step = block.inside.nonzero(as_tuple=True)
    parts = []
    for rows in block.chunks(torch.arange(len(batch), device=batch.device)) or (batch,):
        b, t = batch[rows], step[rows]
        parts.append(
            score_laws(rule, block.rows(b, t), block.drafted[b, t], block.context_at(b, t), with_gap)
        )
    return spread(parts, block, batch, step)


def spread(parts: list[Scores], block: Block, batch: Tensor, step: Tensor) -> Scores:
    """Scores of rows, in chunks, written to their places in [B, T]."""

    def place(name: str) -> Tensor:
        values = torch.cat([getattr(part, name) for part in parts])
        table = torch.zeros(block.drafted.shape, dtype=values.dtype, device=values.device)
        table[batch, step] = values
        return table

    gap = None if parts[0].gap is None else place("gap")
    return Scores(place("deferred"), place("kept"), place("ratio"), place("exact_ratio"), gap)
