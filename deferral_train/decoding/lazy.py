"""Lazy cascade: a draft-stage rule decides, and the verifier is called only when it is needed.

Tokens that the rule keeps are emitted unverified. Where it defers, the drafted token is checked against the
verifier: one pass scores it and takes in every token emitted since the last pass; if it stands, the same
pass gives a bonus token. The target distribution is the token cascade's, except that bonus tokens follow the verifier
(``bonus="exact"`` withholds them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.distributions import Drafted
from deferral_train.decoding.loop import DecodingState, advance
from deferral_train.decoding.token_execution import decide_early, drafter_distributions
from deferral_train.rules.registry import make_rule
from deferral_train.rules.verify import Origin, Verdict, verify_block


def lazy_cascade(state: DecodingState) -> None:
    """Until all rows end: draft one token per row; check the deferred ones, emit the others as they are."""
    while state.running:
        decision, sampling = drafter_distributions(state)
        drafted = state.distributions.draw_one(decision, sampling, state.generator)
        state.tokens.write(0, drafted[:, None])
        deferred = decide_early(state, decision, sampling, drafted).tolist()
        verdict = _check(state, drafted, decision, sampling) if any(deferred) else None
        _emit(state, drafted, deferred, verdict)


def _check(state: DecodingState, drafted: Tensor, decision: Tensor, sampling: Tensor | None) -> Verdict:
    """One verifier pass over everything pending and the drafted token; the deferred rows use its verdict."""
    distributions, tokens = state.distributions, state.tokens
    logits = state.verifier.feed(ahead=1, keep=2).to(tokens.device)
    place = (
        Drafted([1] * len(drafted), state.ends.are_eos(drafted.tolist())) if distributions.strict else None
    )
    verifier = distributions.decision(logits, tokens, 0, place)
    return verify_block(
        make_rule("lossless"),
        drafted[:, None],
        decision[:, None],
        verifier,
        temperature=distributions.temperature,
        drafter_sampling_logits=None if sampling is None else sampling[:, None],
        verifier_sampling_logits=distributions.sampling(logits, verifier, tokens, 0, place),
        bonus="verifier" if state.settings.bonus == "verifier" else "none",
        generator=state.generator,
    )


def _emit(state: DecodingState, drafted: Tensor, deferred: list[bool], verdict: Verdict | None) -> None:
    block = torch.stack([drafted, torch.full_like(drafted, state.tokens.pad_token_id)], dim=1)
    offered, passed = [1] * len(deferred), [True] * len(deferred)
    if verdict is not None:
        checked = torch.tensor(deferred, device=drafted.device)
        following = verdict.next_token.clamp(min=0)
        stands = (verdict.accepted == 1) | ~checked
        block[:, 0] = torch.where(stands, drafted, following)
        block[:, 1] = torch.where(stands & checked, following, block[:, 1])
        passed = stands.tolist()
        withheld = (verdict.next_token < 0).tolist()
        offered = [1 + int(d and p and not w) for d, p, w in zip(deferred, passed, withheld)]
    state.tokens.write(0, block)
    counts, done = state.ends.cut(state.tokens, block.tolist(), offered, state.together)
    for row, was_deferred, stood, count in zip(state.tokens.rows, deferred, passed, counts):
        _record(state, row, was_deferred, stood, count)
    advance(state, counts, done, state.spent)


def _record(state: DecodingState, row: int, deferred: bool, stood: bool, count: int) -> None:
    stats = state.stats
    stats.add(row, drafted=1, decided=1, drafter_calls=1)
    if not deferred:
        stats.add(row, unverified=1)
        stats.emit(row, Origin.UNVERIFIED)
        return
    stats.add(row, deferred=1, verifier_calls=1)
    if not stood:
        stats.add(row, rejected=1, resampled=1)
        stats.emit(row, Origin.RESAMPLED)
        return
    stats.add(row, accepted=1, bonus=count - 1)
    stats.emit(row, Origin.ACCEPTED)
    if count == 2:
        stats.emit(row, Origin.BONUS)
