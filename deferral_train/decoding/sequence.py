"""Sequence cascade: the drafter writes the whole answer, then the rule decides once per row.

SeqCascade[Chow] of the paper: leave the row to the verifier iff q(x | prompt) < 1 - alpha. Other draft-stage
rules see the mean entropy of the row, heads the means of their gap and D_TV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.loop import Cascade
from deferral_train.decoding.token_execution import drafter_laws, emit_one, verifier_token
from deferral_train.errors import InputError
from deferral_train.rules.summary import Summary
from deferral_train.rules.verify import Origin

FIELDS = frozenset({"drafter_max", "drafter_entropy"})


def sequence_cascade(cascade: Cascade) -> None:
    """Draft every row to its end, decide, and let the verifier write the deferred rows anew."""
    if not cascade.rule.needs <= FIELDS:
        raise InputError(
            f"execution='sequence': rule {cascade.rule.name} reads {', '.join(sorted(cascade.rule.needs))}; "
            "a whole row has a probability and a mean entropy only (chow, chow_log)"
        )
    rows = list(range(len(cascade.tokens.ids)))
    cascade.active = [cascade.drafter]
    logprob, entropy = _draft_rows(cascade)
    counts = [cascade.tokens.final_lengths[row] - cascade.tokens.prompt_length for row in rows]
    mean = entropy / torch.tensor(counts, dtype=entropy.dtype, device=entropy.device)
    summary = Summary({"drafter_max": logprob.exp(), "drafter_entropy": mean})
    deferred = cascade.rule.defer(summary).tolist()  # type: ignore[attr-defined]
    for row, count, was_deferred in zip(rows, counts, deferred):
        _record(cascade, row, count, was_deferred)
    _rewrite(cascade, [row for row, was_deferred in zip(rows, deferred) if was_deferred])


def _draft_rows(cascade: Cascade) -> tuple[Tensor, Tensor]:
    """Let the drafter write all rows; log q(x | prompt) and the summed entropy of each, [R], float64."""
    rows = len(cascade.tokens.ids)
    logprob = torch.zeros(rows, dtype=torch.float64, device=cascade.tokens.device)
    entropy = torch.zeros_like(logprob)
    while cascade.running:
        decision, sampling = drafter_laws(cascade)
        token = cascade.laws.draw(decision, sampling, cascade.generator)
        law = torch.log_softmax(decision.double(), dim=-1)
        index = cascade.tokens.index
        logprob[index] += law.gather(1, token[:, None])[:, 0]
        entropy[index] += torch.special.entr(law.exp()).sum(dim=-1)
        emit_one(cascade, token)
    return logprob, entropy


def _record(cascade: Cascade, row: int, count: int, deferred: bool) -> None:
    cascade.ledger.add(row, drafted=count, decided=count, drafter_calls=count)
    if deferred:
        cascade.ledger.add(row, rejected=count, deferred=count)
        return
    cascade.ledger.add(row, kept=count)
    for _ in range(count):
        cascade.ledger.emit(row, Origin.KEPT)


def _rewrite(cascade: Cascade, rows: list[int]) -> None:
    """The verifier alone writes ``rows`` from their prompts."""
    if not rows:
        return
    cascade.active = [cascade.verifier]
    cascade.tokens.restart(rows)
    cascade.verifier.start_over(cascade.tokens)
    cascade.verifier.joined()
    while cascade.running:
        token = verifier_token(cascade)
        for row in cascade.tokens.rows:
            cascade.ledger.add(row, resampled=1, verifier_calls=1)
            cascade.ledger.emit(row, Origin.RESAMPLED)
        emit_one(cascade, token)
