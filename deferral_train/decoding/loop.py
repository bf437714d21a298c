"""The draft-verify loop: take a proposed block, let the rule judge it, emit, let finished rows go.

Batched speculative execution (Narasimhan et al. 2025, Algorithms 4-6) with per-row acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.laws import SamplingLaws
from deferral_train.decoding.outcome import Outcome, outcome_of
from deferral_train.decoding.proposing import Draft, Proposer
from deferral_train.decoding.stats import Ledger
from deferral_train.decoding.stepper import Stepper
from deferral_train.decoding.tokens import TokenRows
from deferral_train.rules.base import Rule
from deferral_train.rules.summary import CONTEXT_FIELDS, PREVIOUS_TOKENS, Summary
from deferral_train.rules.verify import verify_block


@dataclass
class Cascade:
    """Everything that one call works on. ``spent`` is the estimated loss per running row under a limit."""

    drafter: Stepper
    verifier: Stepper
    rule: Rule
    laws: SamplingLaws
    tokens: TokenRows
    ends: EndOfRow
    ledger: Ledger
    num_draft_tokens: int
    proposer: Proposer
    bonus: str = "verifier"
    generator: torch.Generator | None = None
    max_request_loss: float | None = None
    spent: Tensor | None = None
    token_streamer: Any = None
    token_log: Any = None
    context_fields: frozenset[str] = field(init=False)
    active: list[Stepper] = field(init=False)  # models whose caches follow the running rows

    def __post_init__(self) -> None:
        self.active = [*self.proposer.steppers, self.verifier]
        asked = self.rule.needs | (self.rule.gap_needs if self.max_request_loss is not None else frozenset())
        self.context_fields = asked & CONTEXT_FIELDS
        if self.max_request_loss is not None:
            self.spent = torch.zeros(len(self.tokens.rows), dtype=torch.float64, device=self.tokens.device)
            self.ledger.spent = dict.fromkeys(range(len(self.tokens.ids)), 0.0)

    @property
    def exact(self) -> bool:
        """Whether the law of the place after a block is asked of the proposer."""
        return self.bonus == "exact" and self.rule.drafts

    @property
    def running(self) -> bool:
        """Whether any row goes on."""
        return bool(self.tokens.rows)


def speculative(cascade: Cascade) -> None:
    """Draft a block, verify it in one pass, emit what the rule's target law lets through; until all rows
    end.
    """
    # Numbers out of range are seen to where they arise; entered per block this would cost as much as a rule does.
    with np.errstate(over="ignore", invalid="ignore"):
        while cascade.running:
            draft = propose(cascade)
            emit(cascade, judge(cascade, draft), draft)


def propose(cascade: Cascade) -> Draft:
    """A block of up to ``num_draft_tokens`` per row, one less than the row may still emit."""
    drafts = cascade.rule.drafts
    limits = [min(cascade.num_draft_tokens, room - 1) if drafts else 0 for room in cascade.tokens.room]
    return cascade.proposer.propose(limits, cascade.exact)


def judge(cascade: Cascade, draft: Draft) -> Outcome:
    """Score the block with the verifier in one pass and let the rule decide."""
    depth = draft.depth
    logits = cascade.verifier.feed(ahead=depth, keep=depth + 1)
    decision = cascade.laws.decision(logits, cascade.tokens)
    sampling = cascade.laws.sampling(logits, decision, cascade.tokens)
    outcome = _outcome(cascade, draft, decision, sampling)
    if cascade.token_log is not None:
        cascade.token_log.block(cascade, draft, decision, outcome)
    return outcome


def _outcome(cascade: Cascade, draft: Draft, decision: Tensor, sampling: Tensor | None) -> Outcome:
    rule, bonus = cascade.rule, cascade.bonus if cascade.rule.drafts else "verifier"
    context = context_of(cascade, draft)
    # Without a draft nothing can be kept, so that there is nothing to charge.
    limit = cascade.max_request_loss if draft.columns else None
    verdict = verify_block(
        rule,
        draft.tokens,
        draft.logits,
        decision,
        temperature=cascade.laws.temperature,
        drafter_sampling_logits=draft.sampling,
        verifier_sampling_logits=sampling,
        lengths=draft.lengths,
        bonus=bonus,
        generator=cascade.generator,
        context=context,
        max_request_loss=limit,
        spent=cascade.spent if limit is not None else None,
    )
    return outcome_of(verdict, draft)


def context_of(cascade: Cascade, draft: Draft) -> Summary | None:
    """Summary fields [B, T (+1 for an exact bonus)] that logits do not give, as far as the rule asks for
    them.
    """
    if not cascade.context_fields:
        return None
    columns = draft.columns
    place = torch.arange(columns, device=draft.tokens.device)[None].expand(len(draft.tokens), -1)
    generated = torch.tensor(cascade.tokens.lengths, device=place.device) - cascade.tokens.prompt_length
    given: dict[str, Tensor | None] = {"draft_position": place, "position": place + generated[:, None]}
    given |= previous_tokens(cascade, columns)
    if "drafter_hidden" in cascade.context_fields:
        given["drafter_hidden"] = draft.hidden
    if "verifier_hidden" in cascade.context_fields:
        given["verifier_hidden"] = cascade.verifier.hidden(draft.tokens.shape[1] + 1)[:, :columns]
    if "verifier_hidden_at_token" in cascade.context_fields:
        given["verifier_hidden_at_token"] = cascade.verifier.hidden(draft.tokens.shape[1] + 1)[:, 1:]
    return Summary({name: value for name in cascade.context_fields if (value := given[name]) is not None})


def previous_tokens(cascade: Cascade, columns: int) -> dict[str, Tensor]:
    """Tokens before each of the next ``columns`` places, [B, columns] by field, as far as the rule asks for them."""
    return {
        name: cascade.tokens.previous(back, columns)
        for back, name in enumerate(PREVIOUS_TOKENS, start=1)
        if name in cascade.context_fields
    }


def emit(cascade: Cascade, outcome: Outcome, draft: Draft) -> None:
    """Append what stands and the correction or bonus; cut at ends and limits; let finished rows leave."""
    tokens = cascade.tokens
    tokens.put_last(outcome.emitted)
    counts, done = cascade.ends.cut(tokens, outcome.emitted, [len(new) for new in outcome.emitted])
    calls = draft.calls
    if calls is None:
        calls = [proposed + 1 for proposed in outcome.proposed] if cascade.exact else outcome.proposed
    cascade.ledger.block(tokens.rows, counts, calls, outcome)
    cascade.proposer.observe(outcome.proposed, outcome.accepted)
    advance(cascade, counts, done, outcome.spent)


def advance(cascade: Cascade, counts: list[int], done: list[bool], spent: Tensor | None = None) -> None:
    """Rows grow by ``counts`` tokens already written; finished ones leave the batch."""
    tokens = cascade.tokens
    before = tokens.final_lengths[0]
    tokens.extend(counts)
    for stepper in cascade.active:
        stepper.settle()
    if spent is not None:
        cascade.spent = spent
        cascade.ledger.spent.update(zip(tokens.rows, spent.tolist()))
    if cascade.token_streamer is not None:
        cascade.token_streamer.put(tokens.ids[0, before : tokens.final_lengths[0]].cpu())
    if any(done):
        left = _exchange(cascade, [place for place, over in enumerate(done) if over])
        if left:
            _leave(cascade, [place for place in range(len(done)) if place not in left])
            _let_in(cascade)


def _exchange(cascade: Cascade, ended: list[int]) -> list[int]:
    """Waiting rows take the places of rows that have ended, as far as that goes; which places are left."""
    tokens = cascade.tokens
    if not all(stepper.admits_exchange for stepper in cascade.active):
        return ended
    while ended and tokens.waiting:
        rows = tokens.waiting[: len(ended)]
        for stepper in cascade.active:  # asking a model feeds it prompts
            rows = rows[: stepper.exchanges(rows)] if rows else rows
        if not rows:
            break
        places, ended = ended[: len(rows)], ended[len(rows) :]
        for stepper in cascade.active:
            stepper.exchange(places, rows)
        tokens.exchange(places, rows)
        for stepper in cascade.active:
            stepper.joined()
        if cascade.spent is not None:
            cascade.spent = cascade.spent.index_fill(0, tokens.index.new_tensor(places), 0.0)
    return ended


def _leave(cascade: Cascade, kept: list[int]) -> None:
    tokens = cascade.tokens
    index = torch.tensor(kept, dtype=torch.long, device=tokens.device)
    tokens.keep_rows(kept, index)
    if cascade.spent is not None:
        cascade.spent = cascade.spent.index_select(0, index)
    if kept:
        for stepper in cascade.active:
            stepper.keep_rows(kept, index)


def _let_in(cascade: Cascade) -> None:
    """Waiting rows take the places of those that have left."""
    tokens = cascade.tokens
    group = tokens.newcomers()
    if group is None:
        return
    alone = not tokens.rows
    for stepper in cascade.active:
        if alone:
            stepper.start_over(group)
        else:
            stepper.join(group)
    tokens.join(group)
    for stepper in cascade.active:
        stepper.joined()
    if cascade.spent is not None:
        cascade.spent = torch.nn.functional.pad(cascade.spent, (0, len(group.rows)))
