"""Token cascade: one decision per token, no block (Narasimhan et al. 2025, Algorithms 2 and 3).

A draft-stage rule calls the verifier only where it defers; the tokens kept since its last call are then fed
to it in the same pass. A rule that reads the verifier calls it at every token (the oracle cascade, Algorithm
3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.cached_model import CachedModel
from deferral_train.decoding.checks import estimates_early
from deferral_train.decoding.loop import DecodingState, advance, generated, previous_tokens
from deferral_train.errors import InputError
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.summary import Summary
from deferral_train.rules.verify import Origin


def token_cascade(state: DecodingState) -> None:
    """Until all rows end: decide, then draw from the drafter's distribution or from the verifier's."""
    while state.running:
        token, deferred, called = _next_token(state)
        for row, was_deferred in zip(state.tokens.rows, deferred):
            _record(state, row, was_deferred, called)
        emit_one(state, token)


def emit_one(state: DecodingState, token: Tensor) -> None:
    """Append one token [B] per row."""
    state.tokens.write(0, token[:, None])
    counts, done = state.ends.cut(state.tokens, token[:, None].tolist(), [1] * len(token))
    advance(state, counts, done, state.spent)


def _next_token(state: DecodingState) -> tuple[Tensor, list[bool], bool]:
    """The token of each row [B], which rows deferred, and whether every row needed the verifier."""
    rule = state.rule
    if not rule.drafts or rule.is_lossless:
        return verifier_token(state), [True] * len(state.tokens.rows), True
    decision, sampling = drafter_distributions(state)
    drafted = state.distributions.draw_one(decision, sampling, state.generator)
    reads_verifier = rule.stage == "verify" and bool(rule.needs)
    if reads_verifier or (state.settings.max_request_loss is not None and not estimates_early(rule)):
        distributions = _both_distributions(state, decision, sampling)
        defer = _decide(state, distributions, drafted)
        theirs = state.distributions.draw_one(
            distributions.verifier_logits, distributions.verifier_sampling_logits, state.generator
        )
        return torch.where(defer, theirs, drafted), defer.tolist(), True
    defer = decide_early(state, decision, sampling, drafted)
    deferred = defer.tolist()
    if any(deferred):
        drafted = torch.where(defer, verifier_token(state), drafted)
    return drafted, deferred, False


def drafter_distributions(state: DecodingState) -> tuple[Tensor, Tensor | None]:
    """The drafter's decision and sampling logits [B, V] behind every row's end."""
    return _distributions_of(state, state.drafter, "drafter")


def verifier_token(state: DecodingState) -> Tensor:
    """A token [B] of the verifier's distribution behind every row's end."""
    decision, sampling = _distributions_of(state, state.verifier, "verifier")
    return state.distributions.draw_one(decision, sampling, state.generator)


def _distributions_of(state: DecodingState, model: CachedModel, role: str) -> tuple[Tensor, Tensor | None]:
    logits = model.feed().to(state.tokens.device)
    decision = state.distributions.decision(logits, state.tokens)
    if not bool(torch.isfinite(decision.amax(dim=-1)).all()):
        raise InputError(
            f"{role}'s logits are NaN or infinite, or every token is forbidden; check its weights, number format and "
            "logits processors"
        )
    sampling = state.distributions.sampling(logits, decision, state.tokens)
    return decision[:, 0], None if sampling is None else sampling[:, 0]


def _both_distributions(state: DecodingState, decision: Tensor, sampling: Tensor | None) -> Distributions:
    verifier, verifier_sampling = _distributions_of(state, state.verifier, "verifier")
    return Distributions.of(decision, verifier, state.distributions.temperature, sampling, verifier_sampling)


def decide_early(state: DecodingState, decision: Tensor, sampling: Tensor | None, drafted: Tensor) -> Tensor:
    """Decisions of a draft-stage rule on drafted tokens, bool [B]: True defers."""
    rule = state.rule
    if rule.is_lossless or not (rule.needs or state.settings.max_request_loss is not None):
        return torch.full((len(decision),), rule.is_lossless, device=decision.device)
    return _decide(
        state,
        Distributions.of(decision, decision, state.distributions.temperature, sampling, sampling),
        drafted,
    )


def _decide(state: DecodingState, distributions: Distributions, drafted: Tensor) -> Tensor:
    """The rule's decision [B]; under a limit a token whose estimated loss does not fit is deferred too."""
    rule, limit = state.rule, state.settings.max_request_loss
    extra = rule.gap_needs if limit is not None else frozenset()
    summary = rule.read(distributions, drafted, _context(state), extra)
    defer = rule.defer(summary).expand(len(drafted))  # type: ignore[attr-defined]
    if limit is None or state.spent is None:
        return defer
    cost = rule.estimated_gap(summary).to(state.spent).clamp(min=0.0)
    # Written so that a cost that is not a number never fits.
    defer = defer | ~((state.spent < limit) & (state.spent + cost <= limit))
    state.spent = torch.where(defer, state.spent, state.spent + cost)
    return defer


def _context(state: DecodingState) -> Summary | None:
    """Context fields [B] of the next position; a token cascade has no block, so that every place is 0."""
    if not state.context_fields:
        return None
    given = {name: found[:, 0] for name, found in previous_tokens(state, 1).items()}
    position = generated(state)
    given |= {"draft_position": torch.zeros_like(position), "position": position}
    for name, model in (("drafter_hidden", state.drafter), ("verifier_hidden", state.verifier)):
        if name in state.context_fields:
            given[name] = model.hidden(1)[:, 0]
    return Summary({name: given[name] for name in state.context_fields})


def _record(state: DecodingState, row: int, deferred: bool, called: bool) -> None:
    stats, drafts = state.stats, int(state.rule.drafts and not state.rule.is_lossless)
    stats.emit(row, Origin.RESAMPLED if deferred else Origin.KEPT)
    stats.add(row, verifier_calls=int(called or deferred), drafter_calls=drafts, decided=1)
    if deferred:
        stats.add(row, resampled=1, deferred=1)
    else:
        stats.add(row, drafted=1, kept=1)
