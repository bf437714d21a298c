"""Token cascade: one decision per token, no block (Narasimhan et al. 2025, Algorithms 2 and 3).

A draft-stage rule calls the verifier only where it defers; the tokens kept since its last call are then fed
to it in the same pass. A rule that reads the verifier calls it at every token (the oracle cascade, Algorithm
3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.checks import estimates_early
from deferral_train.decoding.loop import Cascade, advance, previous_tokens
from deferral_train.rules.laws import Laws
from deferral_train.rules.summary import Summary
from deferral_train.rules.verify import Origin


def token_cascade(cascade: Cascade) -> None:
    """Until all rows end: decide, then draw from the drafter's law or from the verifier's."""
    while cascade.running:
        token, deferred, called = _next_token(cascade)
        for row, was_deferred in zip(cascade.tokens.rows, deferred):
            _record(cascade, row, was_deferred, called)
        emit_one(cascade, token)


def emit_one(cascade: Cascade, token: Tensor) -> None:
    """Append one token [B] per row."""
    cascade.tokens.write(0, token[:, None])
    counts, done = cascade.ends.cut(cascade.tokens, token[:, None].tolist(), [1] * len(token))
    advance(cascade, counts, done, cascade.spent)


def _next_token(cascade: Cascade) -> tuple[Tensor, list[bool], bool]:
    """The token of each row [B], which rows deferred, and whether every row needed the verifier."""
    rule = cascade.rule
    if not rule.drafts or rule.is_lossless:
        return verifier_token(cascade), [True] * len(cascade.tokens.rows), True
    decision, sampling = drafter_laws(cascade)
    drafted = cascade.laws.draw(decision, sampling, cascade.generator)
    reads_verifier = rule.stage == "verify" and bool(rule.needs)
    if reads_verifier or (cascade.max_request_loss is not None and not estimates_early(rule)):
        laws = _both_laws(cascade, decision, sampling)
        defer = _decide(cascade, laws, drafted)
        theirs = cascade.laws.draw(laws.verifier_logits, laws.verifier_sampling_logits, cascade.generator)
        return torch.where(defer, theirs, drafted), defer.tolist(), True
    defer = decide_early(cascade, decision, sampling, drafted)
    deferred = defer.tolist()
    if any(deferred):
        drafted = torch.where(defer, verifier_token(cascade), drafted)
    return drafted, deferred, False


def drafter_laws(cascade: Cascade) -> tuple[Tensor, Tensor | None]:
    """The drafter's decision and sampling logits [B, V] behind every row's end."""
    return _laws_of(cascade, cascade.drafter.feed())


def verifier_token(cascade: Cascade) -> Tensor:
    """A token [B] of the verifier's law behind every row's end."""
    decision, sampling = _laws_of(cascade, cascade.verifier.feed())
    return cascade.laws.draw(decision, sampling, cascade.generator)


def _laws_of(cascade: Cascade, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    decision = cascade.laws.decision(logits, cascade.tokens)
    sampling = cascade.laws.sampling(logits, decision, cascade.tokens)
    return decision[:, 0], None if sampling is None else sampling[:, 0]


def _both_laws(cascade: Cascade, decision: Tensor, sampling: Tensor | None) -> Laws:
    verifier, verifier_sampling = _laws_of(cascade, cascade.verifier.feed())
    return Laws.of(decision, verifier, cascade.laws.temperature, sampling, verifier_sampling)


def decide_early(cascade: Cascade, decision: Tensor, sampling: Tensor | None, drafted: Tensor) -> Tensor:
    """What a draft-stage rule decides about the drafted tokens [B] from the drafter's law alone: defer, bool [B]."""
    rule = cascade.rule
    if rule.is_lossless or not (rule.needs or cascade.max_request_loss is not None):
        return torch.full((len(decision),), rule.is_lossless, device=decision.device)
    return _decide(
        cascade, Laws.of(decision, decision, cascade.laws.temperature, sampling, sampling), drafted
    )


def _decide(cascade: Cascade, laws: Laws, drafted: Tensor) -> Tensor:
    """The rule's decision [B]; under a limit a token whose estimated loss does not fit is deferred too."""
    rule, limit = cascade.rule, cascade.max_request_loss
    extra = rule.gap_needs if limit is not None else frozenset()
    summary = rule.read(laws, drafted, _context(cascade), extra)
    defer = rule.defer(summary).expand(len(drafted))  # type: ignore[attr-defined]
    if limit is None or cascade.spent is None:
        return defer
    cost = rule.estimated_gap(summary).to(cascade.spent).clamp(min=0.0)
    # Written so that a cost that is not a number never fits.
    defer = defer | ~((cascade.spent < limit) & (cascade.spent + cost <= limit))
    cascade.spent = torch.where(defer, cascade.spent, cascade.spent + cost)
    return defer


def _context(cascade: Cascade) -> Summary | None:
    """Context fields [B] of the next position; a token cascade has no block, so that every place is 0."""
    if not cascade.context_fields:
        return None
    tokens = cascade.tokens
    lengths = torch.tensor(tokens.lengths, device=tokens.device)
    given = {"draft_position": torch.zeros_like(lengths), "position": lengths - tokens.prompt_length}
    given |= {name: found[:, 0] for name, found in previous_tokens(cascade, 1).items()}
    for name, stepper in (("drafter_hidden", cascade.drafter), ("verifier_hidden", cascade.verifier)):
        if name in cascade.context_fields:
            given[name] = stepper.hidden(1)[:, 0]
    return Summary({name: given[name] for name in cascade.context_fields})


def _record(cascade: Cascade, row: int, deferred: bool, called: bool) -> None:
    ledger, drafts = cascade.ledger, int(cascade.rule.drafts and not cascade.rule.is_lossless)
    ledger.emit(row, Origin.RESAMPLED if deferred else Origin.KEPT)
    ledger.add(row, verifier_calls=int(called or deferred), drafter_calls=drafts, decided=1)
    if deferred:
        ledger.add(row, resampled=1, deferred=1)
    else:
        ledger.add(row, drafted=1, kept=1)
