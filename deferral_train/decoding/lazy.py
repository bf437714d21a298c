"""Lazy cascade: a draft-stage rule decides, and the verifier is called only when it is needed.

Tokens that the rule keeps are emitted unverified. Where it defers, the drafted token is checked against the
verifier: one pass scores it and takes in every token emitted since the last pass; if it stands, the same
pass gives a bonus token. The target law is the token cascade's, except that bonus tokens follow the verifier
(``bonus="exact"`` withholds them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.loop import Cascade, advance
from deferral_train.decoding.token_execution import decide_early, drafter_laws
from deferral_train.rules.registry import make_rule
from deferral_train.rules.verify import Origin, Verdict, verify_block


def lazy_cascade(cascade: Cascade) -> None:
    """Until all rows end: draft one token per row; check the deferred ones, emit the others as they are."""
    while cascade.running:
        decision, sampling = drafter_laws(cascade)
        drafted = cascade.laws.draw(decision, sampling, cascade.generator)
        cascade.tokens.write(0, drafted[:, None])
        deferred = decide_early(cascade, decision, sampling, drafted).tolist()
        verdict = _check(cascade, drafted, decision, sampling) if any(deferred) else None
        _emit(cascade, drafted, deferred, verdict)


def _check(cascade: Cascade, drafted: Tensor, decision: Tensor, sampling: Tensor | None) -> Verdict:
    """One verifier pass over everything pending and the drafted token; the deferred rows use its verdict."""
    logits = cascade.verifier.feed(ahead=1, keep=2)
    verifier = cascade.laws.decision(logits, cascade.tokens)
    return verify_block(
        make_rule("lossless"),
        drafted[:, None],
        decision[:, None],
        verifier,
        temperature=cascade.laws.temperature,
        drafter_sampling_logits=None if sampling is None else sampling[:, None],
        verifier_sampling_logits=cascade.laws.sampling(logits, verifier, cascade.tokens),
        bonus="verifier" if cascade.bonus == "verifier" else "none",
        generator=cascade.generator,
    )


def _emit(cascade: Cascade, drafted: Tensor, deferred: list[bool], verdict: Verdict | None) -> None:
    block = torch.stack([drafted, torch.full_like(drafted, cascade.tokens.pad_token_id)], dim=1)
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
    cascade.tokens.write(0, block)
    counts, done = cascade.ends.cut(cascade.tokens, block.tolist(), offered)
    for row, was_deferred, stood, count in zip(cascade.tokens.rows, deferred, passed, counts):
        _record(cascade, row, was_deferred, stood, count)
    advance(cascade, counts, done, cascade.spent)


def _record(cascade: Cascade, row: int, deferred: bool, stood: bool, count: int) -> None:
    ledger = cascade.ledger
    ledger.add(row, drafted=1, decided=1, drafter_calls=1)
    if not deferred:
        ledger.add(row, unverified=1)
        ledger.emit(row, Origin.UNVERIFIED)
        return
    ledger.add(row, deferred=1, verifier_calls=1)
    if not stood:
        ledger.add(row, rejected=1, resampled=1)
        ledger.emit(row, Origin.RESAMPLED)
        return
    ledger.add(row, accepted=1, bonus=count - 1)
    ledger.emit(row, Origin.ACCEPTED)
    if count == 2:
        ledger.emit(row, Origin.BONUS)
