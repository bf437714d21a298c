"""Sequence cascade: the drafter writes the whole answer, then the rule decides once per row.

SeqCascade[Chow] of the paper: leave the row to the verifier iff q(x | prompt) < 1 - alpha. Other draft-stage
rules see the mean entropy of the row, heads the means of their gap and D_TV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.loop import DecodingState
from deferral_train.decoding.token_execution import drafter_distributions, emit_one, verifier_token
from deferral_train.errors import InputError
from deferral_train.rules.summary import Summary
from deferral_train.rules.verify import Origin

FIELDS = frozenset({"drafter_max", "drafter_entropy"})


def sequence_cascade(state: DecodingState) -> None:
    """Draft every row to its end, decide, and let the verifier write the deferred rows anew."""
    if not state.rule.needs <= FIELDS:
        raise InputError(
            f"execution='sequence': rule {state.rule.name} reads {', '.join(sorted(state.rule.needs))}; "
            "a whole row has a probability and a mean entropy only (chow, chow_log)"
        )
    rows = list(range(len(state.tokens.ids)))
    state.active = [state.drafter]
    logprob, entropy = _draft_rows(state)
    counts = [state.tokens.final_lengths[row] - state.tokens.prompt_length for row in rows]
    mean = entropy / torch.tensor(counts, dtype=entropy.dtype, device=entropy.device)
    summary = Summary({"drafter_max": logprob.exp(), "drafter_entropy": mean})
    deferred = state.rule.defer(summary).tolist()  # type: ignore[attr-defined]
    for row, count, was_deferred in zip(rows, counts, deferred):
        _record(state, row, count, was_deferred)
    _rewrite(state, [row for row, was_deferred in zip(rows, deferred) if was_deferred])


def _draft_rows(state: DecodingState) -> tuple[Tensor, Tensor]:
    """Let the drafter write all rows; log q(x | prompt) and the summed entropy of each, [R], float64."""
    rows = len(state.tokens.ids)
    logprob = torch.zeros(rows, dtype=torch.float64, device=state.tokens.device)
    entropy = torch.zeros_like(logprob)
    while state.running:
        decision, sampling = drafter_distributions(state)
        token = state.distributions.draw_one(decision, sampling, state.generator)
        distribution = torch.log_softmax(decision.double(), dim=-1)
        index = state.tokens.index
        logprob[index] += distribution.gather(1, token[:, None])[:, 0]
        entropy[index] += torch.special.entr(distribution.exp()).sum(dim=-1)
        emit_one(state, token)
    return logprob, entropy


def _record(state: DecodingState, row: int, count: int, deferred: bool) -> None:
    state.stats.add(row, drafted=count, decided=count, drafter_calls=count)
    if deferred:
        state.stats.add(row, rejected=count, deferred=count)
        return
    state.stats.add(row, kept=count)
    for _ in range(count):
        state.stats.emit(row, Origin.KEPT)


def _rewrite(state: DecodingState, rows: list[int]) -> None:
    """The verifier alone writes ``rows`` from their prompts."""
    if not rows:
        return
    state.active = [state.verifier]
    state.tokens.restart(rows)
    state.verifier.start_over()
    while state.running:
        token = verifier_token(state)
        for row in state.tokens.rows:
            state.stats.add(row, resampled=1, verifier_calls=1)
            state.stats.emit(row, Origin.RESAMPLED)
        emit_one(state, token)
