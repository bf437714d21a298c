"""Scores of a whole block in one compiled graph: the CUDA variant.

Both inputs are reduced to a few numbers per position by fused reductions, so that no intermediate of size [.., V] is
written. Corrections and the eta of token rules then look at single rows, as in scoring.py. B batch, T drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from deferral_train.rules.base import PositionRule, Rule, TokenRule
from deferral_train.rules.block import Block
from deferral_train.rules.laws import check_normaliser
from deferral_train.rules.scoring import Scores, check_drawn, pass_ratio, refine
from deferral_train.rules.summary import Summary

REDUCED = (
    "drafter_max",
    "verifier_max",
    "drafter_entropy",
    "verifier_entropy",
    "verifier_at_drafter_argmax",
    "tv",
)
LOGARITHMS = frozenset({"drafter_max", "verifier_max", "verifier_at_drafter_argmax"})  # of what is reduced
FIELDS_AT_HAND = frozenset(REDUCED) | {"tv_unscaled", "draft_position"}
Reduce = Callable[[Tensor, Tensor, Tensor, tuple[str, ...]], dict[str, Tensor]]


def applies(rule: Rule, block: Block, limited: bool) -> bool:
    """Whether this path knows all that the rule asks for."""
    if block.verifier_logits.device.type != "cuda" or block.temperature != 1.0:
        return False
    if block.drafter_logits is None or block.drafted.numel() == 0:
        return False
    if block.drafter_sampling_logits is not None or block.verifier_sampling_logits is not None:
        return False
    return knows(rule, limited)


def knows(rule: Rule, limited: bool) -> bool:
    """Whether the rule's fields are among those reduced here."""
    needs = rule.needs | (rule.gap_needs if limited else frozenset())
    plain = isinstance(rule, PositionRule | TokenRule) and needs <= FIELDS_AT_HAND
    return plain or (rule.is_lossless and not limited)


def score_dense(
    rule: Rule, block: Block, with_gap: bool, uniform: Tensor, reduce: Reduce | None = None
) -> Scores:
    """Scores [B, T], as `scoring.score_block` gives them.

    Args:
        reduce: how to reduce; the compiled `reductions` by default.
    """
    assert block.drafter_logits is not None
    drafts, inside = block.drafted.shape[1], block.inside
    wanted = frozenset() if rule.is_lossless else rule.needs
    wanted = (wanted | rule.gap_needs) if with_gap else wanted
    names = tuple(sorted("tv" if name == "tv_unscaled" else name for name in wanted - {"draft_position"}))
    found = (reduce or _compiled())(
        block.drafter_logits[:, :drafts], block.verifier_logits[:, :drafts], block.drafted, names
    )
    for who in ("drafter", "verifier"):
        check_normaliser(found[f"{who}_logsumexp"][inside], f"{who}_logits")
    check_drawn(found["drafter_logprob"][inside])
    p, q = found["verifier_logprob"].exp(), found["drafter_logprob"].exp()
    exact = torch.where(inside, pass_ratio(p, q), torch.zeros_like(p))
    summary = _summary(wanted, found, block)
    gap = rule.estimated_gap(summary).double() if with_gap else None
    if rule.is_lossless:
        return Scores(inside, torch.zeros_like(inside), exact, exact, gap)
    deferred = _decide(rule, found, summary).expand_as(inside)
    kept = ~deferred & (found["verifier_logprob"] > -torch.inf) & inside
    ratio = torch.where(kept, torch.ones_like(exact), exact)
    scores = Scores(deferred & inside, kept, ratio, exact, gap)
    return refine(rule, block, scores, uniform) if isinstance(rule, TokenRule) else scores


def reductions(drafter: Tensor, verifier: Tensor, token: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What a position says in a few numbers: normalisers, the token's log probabilities, and the fields named.

    Args:
        drafter, verifier: decision logits [B, T, V].
        token: [B, T].
        names: of `REDUCED`; those in `LOGARITHMS` come as logarithms.
    """
    drafter_norm, verifier_norm = drafter.logsumexp(-1, keepdim=True), verifier.logsumexp(-1, keepdim=True)
    index = token.unsqueeze(-1)
    found = {
        "drafter_logsumexp": drafter_norm.squeeze(-1),
        "verifier_logsumexp": verifier_norm.squeeze(-1),
        "drafter_logprob": (drafter.gather(-1, index) - drafter_norm).squeeze(-1).clamp(max=0.0),
        "verifier_logprob": (verifier.gather(-1, index) - verifier_norm).squeeze(-1).clamp(max=0.0),
    }
    log_q, log_p = (drafter - drafter_norm).clamp(max=0.0), (verifier - verifier_norm).clamp(max=0.0)
    q, p = log_q.exp(), log_p.exp()
    # Probabilities are left as logarithms: who compares one with another's must exponentiate both in one way, and a
    # compiled graph may round differently from eager code in the last bit.
    if "drafter_max" in names:
        found["drafter_max"] = log_q.amax(-1)
    if "verifier_max" in names:
        found["verifier_max"] = log_p.amax(-1)
    if "drafter_entropy" in names:
        found["drafter_entropy"] = -torch.where(q > 0, q * log_q, 0.0).sum(-1)
    if "verifier_entropy" in names:
        found["verifier_entropy"] = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    if "verifier_at_drafter_argmax" in names:
        top = drafter.max(dim=-1, keepdim=True).indices
        found["verifier_at_drafter_argmax"] = log_p.gather(-1, top).squeeze(-1)
    if "tv" in names:
        found["tv"] = ((p - q).abs().sum(-1) * 0.5).clamp(0.0, 1.0)
    return found


@cache
def _compiled() -> Reduce:
    return torch.compile(reductions)


def _decide(rule: Rule, found: dict[str, Tensor], summary: Summary) -> Tensor:
    if isinstance(rule, PositionRule):
        return rule.defer(summary)
    assert isinstance(rule, TokenRule)
    drafter, verifier = found["drafter_logprob"].unsqueeze(-1), found["verifier_logprob"].unsqueeze(-1)
    return ~rule.keep(drafter, verifier, summary).squeeze(-1)


def _summary(wanted: frozenset[str], found: dict[str, Tensor], block: Block) -> Summary:
    columns = {name: found["tv" if name == "tv_unscaled" else name] for name in wanted - {"draft_position"}}
    columns |= {name: columns[name].exp() for name in LOGARITHMS & set(columns)}
    if "draft_position" in wanted:
        steps = torch.arange(block.drafted.shape[1], device=block.drafted.device)
        columns["draft_position"] = steps.expand_as(block.drafted)
    return Summary(columns)
