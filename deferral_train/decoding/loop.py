"""The draft-verify loop: propose a block, let the rule judge it, emit, let finished rows go.

Batched speculative execution (Narasimhan et al. 2025, Algorithms 4-6) with per-row acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.greedy import is_plain, verify_greedy
from deferral_train.decoding.laws import SamplingLaws
from deferral_train.decoding.stats import Ledger
from deferral_train.decoding.stepper import Stepper
from deferral_train.decoding.stopping import DraftStep, StopDrafting
from deferral_train.decoding.tokens import TokenRows
from deferral_train.rules.base import Rule
from deferral_train.rules.summary import CONTEXT_FIELDS, Summary
from deferral_train.rules.verify import Verdict, verify_block


@dataclass
class Draft:
    """A proposed block.

    Attributes:
        tokens: [B, T] drafted tokens; row b proposes the first ``lengths[b]``.
        lengths: [B] int64.
        logits: the drafter's decision logits, [B, T, V] or [B, T+1, V] for an exact bonus.
        sampling: its logits after temperature and truncation, same shape, or None (see
            SamplingLaws.sampling).
        hidden: the drafter's hidden states [B, T (+1), D], or None.
    """

    tokens: Tensor
    lengths: Tensor
    logits: Tensor
    sampling: Tensor | None = None
    hidden: Tensor | None = None


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
    bonus: str = "verifier"
    stop: StopDrafting | None = None
    generator: torch.Generator | None = None
    max_request_loss: float | None = None
    spent: Tensor | None = None
    token_streamer: Any = None
    token_log: Any = None
    context_fields: frozenset[str] = field(init=False)
    active: list[Stepper] = field(init=False)  # models whose caches follow the running rows

    def __post_init__(self) -> None:
        self.active = [self.drafter, self.verifier]
        asked = self.rule.needs | (self.rule.gap_needs if self.max_request_loss is not None else frozenset())
        self.context_fields = asked & CONTEXT_FIELDS
        if self.max_request_loss is not None:
            self.spent = torch.zeros(len(self.tokens.rows), device=self.tokens.device)

    @property
    def running(self) -> bool:
        """Whether any row goes on."""
        return bool(self.tokens.rows)


def speculative(cascade: Cascade) -> None:
    """Draft a block, verify it in one pass, emit what the rule's target law lets through; until all rows
    end.
    """
    while cascade.running:
        draft = propose(cascade)
        verdict = judge(cascade, draft)
        emit(cascade, draft, verdict)


def propose(cascade: Cascade) -> Draft:
    """Draft up to ``num_draft_tokens`` per row, one less than the row may still emit.

    On a CPU drafting ends as soon as no row wants more; on an accelerator that would wait for the device, so
    that rows run on past their end and the surplus is cut by ``lengths``.
    """
    tokens, laws = cascade.tokens, cascade.laws
    limits = [min(cascade.num_draft_tokens, room - 1) if cascade.rule.drafts else 0 for room in tokens.room]
    depth, exact = max(limits), cascade.bonus == "exact" and cascade.rule.drafts
    if depth == 0 and not exact:
        return _no_draft(cascade)
    growing = _GrowingDraft(cascade, limits)
    logits = cascade.drafter.feed()
    for place in range(depth):
        growing.laws(logits, place)
        token = growing.draw(place, cascade)
        last = place + 1 == depth or growing.complete(place)
        if last and not exact:
            break
        logits = cascade.drafter.step(token[:, None])
        if last:
            break
    drawn = growing.drawn
    if exact:
        growing.laws(logits, drawn)
    return growing.finished(laws, drawn)


class _GrowingDraft:
    """The block while it is being drafted."""

    def __init__(self, cascade: Cascade, limits: list[int]) -> None:
        self.cascade = cascade
        self.lengths = limits
        self.token = torch.empty(0, dtype=torch.long)
        self.decisions: list[Tensor] = []
        self.samplings: list[Tensor | None] = []
        self.hidden: list[Tensor] = []
        self.drawn = 0
        self.watches = cascade.stop is not None or cascade.tokens.device.type == "cpu"

    def laws(self, logits: Tensor, place: int) -> None:
        """Take the drafter's logits [B, 1, V] at ``place``."""
        cascade = self.cascade
        decision = cascade.laws.decision(logits, cascade.tokens, place)
        self.decisions.append(decision)
        self.samplings.append(cascade.laws.sampling(logits, decision, cascade.tokens, place))
        if cascade.drafter.tap is not None:
            self.hidden.append(cascade.drafter.tap.last(1))

    def draw(self, place: int, cascade: Cascade) -> Tensor:
        """Draw the token [B] at ``place`` and write it behind each row's end."""
        sampling = self.samplings[-1]
        token = cascade.laws.draw(
            self.decisions[-1][:, 0], None if sampling is None else sampling[:, 0], cascade.generator
        )
        cascade.tokens.write(place, token[:, None])
        self.token, self.drawn = token, place + 1
        return token

    def complete(self, place: int) -> bool:
        """Whether no row wants to draft beyond ``place``; shortens the rows that end here."""
        if not self.watches:
            return False
        ended = self.cascade.ends.are_eos(self.token.tolist())
        if self.cascade.stop is not None:
            stopped = self.cascade.stop.stops(self._step(place)).tolist()
            ended = [over or stop for over, stop in zip(ended, stopped)]
        if True in ended:
            self.lengths = [
                min(length, place + 1) if over else length for length, over in zip(self.lengths, ended)
            ]
        return max(self.lengths) <= place + 1

    def _step(self, place: int) -> DraftStep:
        sampling = self.samplings[-1]
        return DraftStep(
            place=place,
            token=self.token,
            logits=self.decisions[-1][:, 0],
            sampling=None if sampling is None else sampling[:, 0],
            temperature=self.cascade.laws.temperature,
            hidden=self.hidden[-1][:, 0] if self.hidden else None,
            generated=[n - self.cascade.tokens.prompt_length for n in self.cascade.tokens.lengths],
        )

    def finished(self, laws: SamplingLaws, drawn: int) -> Draft:
        """The block, cut behind the first end of sequence."""
        tokens = self.cascade.tokens.window(0, drawn)
        lengths = torch.tensor(self.lengths, device=tokens.device).clamp_(max=drawn)
        if not self.watches:
            ends = self.cascade.ends.is_eos(tokens)
            first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, drawn)
            lengths = torch.minimum(lengths, first)
        sampling = None
        if self.samplings and self.samplings[0] is not None:
            sampling = torch.cat(self.samplings, dim=1)  # type: ignore[arg-type]
        hidden = torch.cat(self.hidden, dim=1) if self.hidden else None
        return Draft(tokens, lengths, torch.cat(self.decisions, dim=1), sampling, hidden)


def _no_draft(cascade: Cascade) -> Draft:
    rows, device = len(cascade.tokens.rows), cascade.tokens.device
    nothing = torch.empty(rows, 0, dtype=torch.long, device=device)
    vocabulary = cascade.verifier.vocab_size
    sampling = torch.empty(rows, 0, vocabulary, device=device) if cascade.laws.shapes else None
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    return Draft(nothing, lengths, torch.empty(rows, 0, vocabulary, device=device), sampling)


def judge(cascade: Cascade, draft: Draft) -> Verdict:
    """Score the block with the verifier in one pass and let the rule decide."""
    depth = draft.tokens.shape[1]
    logits = cascade.verifier.feed(ahead=depth, keep=depth + 1)
    decision = cascade.laws.decision(logits, cascade.tokens)
    sampling = cascade.laws.sampling(logits, decision, cascade.tokens)
    verdict = _verdict(cascade, draft, decision, sampling)
    if cascade.token_log is not None:
        cascade.token_log.block(cascade, draft, decision, verdict)
    return verdict


def _verdict(cascade: Cascade, draft: Draft, decision: Tensor, sampling: Tensor | None) -> Verdict:
    rule, bonus = cascade.rule, cascade.bonus if cascade.rule.drafts else "verifier"
    context = context_of(cascade, draft)
    greedy = cascade.laws.temperature == 0.0
    # Without a draft nothing can be kept, so that there is nothing to charge.
    limit = cascade.max_request_loss if draft.logits.shape[1] else None
    if greedy and is_plain(rule, bonus, limit, sampling):
        return verify_greedy(rule, draft.tokens, draft.logits, decision, draft.lengths, context)
    return verify_block(
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


def context_of(cascade: Cascade, draft: Draft) -> Summary | None:
    """Summary fields [B, T (+1 for an exact bonus)] that logits do not give, as far as the rule asks for
    them.
    """
    if not cascade.context_fields:
        return None
    columns = draft.logits.shape[1]
    place = torch.arange(columns, device=draft.tokens.device)[None].expand(len(draft.tokens), -1)
    generated = torch.tensor(cascade.tokens.lengths, device=place.device) - cascade.tokens.prompt_length
    given: dict[str, Tensor | None] = {"draft_position": place, "position": place + generated[:, None]}
    if "drafter_hidden" in cascade.context_fields:
        given["drafter_hidden"] = draft.hidden
    if "verifier_hidden" in cascade.context_fields:
        given["verifier_hidden"] = cascade.verifier.hidden(draft.tokens.shape[1] + 1)[:, :columns]
    return Summary({name: value for name in cascade.context_fields if (value := given[name]) is not None})


def emit(cascade: Cascade, draft: Draft, verdict: Verdict) -> None:
    """Append accepted tokens and the correction or bonus; cut at ends and limits; let finished rows leave."""
    tokens = cascade.tokens
    depth = draft.tokens.shape[1]
    tokens.put(verdict.accepted, verdict.next_token.clamp(min=0))
    facts = torch.stack([verdict.accepted, verdict.next_token, draft.lengths], dim=1)
    # The only wait for the device in a round.
    host = torch.cat([facts, tokens.window(0, depth + 1)], dim=1).tolist()
    accepted, following, proposed = ([row[i] for row in host] for i in range(3))
    offered = [count + (token >= 0) for count, token in zip(accepted, following)]
    counts, done = cascade.ends.cut(tokens, [row[3:] for row in host], offered)
    exact = int(cascade.bonus == "exact" and cascade.rule.drafts)
    calls = [length + exact for length in proposed]
    cascade.ledger.block(tokens.rows, proposed, accepted, counts, calls, verdict.origin, verdict.deferred)
    advance(cascade, counts, done, verdict.spent)
    if cascade.stop is not None:
        cascade.stop.observe(proposed, accepted)


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
        _leave(cascade, [place for place, over in enumerate(done) if not over])
        _let_in(cascade)


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
