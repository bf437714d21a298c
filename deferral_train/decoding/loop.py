"""The draft-verify loop: take a proposed block, let the rule decide, emit, let finished rows go.

Batched speculative execution (Narasimhan et al. 2025, Algorithms 4-6) with per-row acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.block import VerifiedBlock, on_host
from deferral_train.decoding.cached_model import CachedModel
from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.distributions import SamplingDistributions
from deferral_train.decoding.proposing import Draft, Proposer
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.stats import StatsRecorder
from deferral_train.decoding.tokens import TokenRows, on_device
from deferral_train.rules.base import Rule
from deferral_train.rules.summary import CONTEXT_FIELDS, PREVIOUS_TOKENS, Summary
from deferral_train.rules.verify import Verdict, raise_fault, verify_block


@dataclass
class DecodingState:
    """Everything that one call works on.

    Attributes:
        drafter, verifier: the models; without a drafter the verifier stands in both places.
        distributions, tokens, ends, stats: of the call.
        together: rows advance by the same number of tokens, so that all are of one length as in ``generate``.
        spent: [B] estimated loss of the running rows under a limit.
        context_fields: what the rule reads beside logits.
        active: models whose caches follow the running rows.
    """

    drafter: CachedModel
    verifier: CachedModel
    rule: Rule
    distributions: SamplingDistributions
    tokens: TokenRows
    ends: EndOfRow
    stats: StatsRecorder
    proposer: Proposer
    settings: Settings
    num_draft_tokens: int
    generator: torch.Generator | None = None
    together: bool = False
    token_streamer: Any = None
    token_log: Any = None
    spent: Tensor | None = field(init=False, default=None)
    context_fields: frozenset[str] = field(init=False)
    active: list[CachedModel] = field(init=False)

    def __post_init__(self) -> None:
        self.active = [*self.proposer.models, self.verifier]
        limited = self.settings.max_request_loss is not None
        asked = self.rule.needs | (self.rule.gap_needs if limited else frozenset())
        self.context_fields = asked & CONTEXT_FIELDS
        if limited:
            rows = len(self.tokens.ids)
            self.spent = torch.zeros(rows, dtype=torch.float64, device=self.tokens.device)
            self.stats.spent = self.spent.clone()

    @property
    def exact(self) -> bool:
        """True where the proposer is asked for the distribution after a block, too."""
        return self.settings.bonus == "exact" and self.rule.drafts

    @property
    def running(self) -> bool:
        """True while any row goes on."""
        return bool(self.tokens.rows)


def speculative(state: DecodingState) -> None:
    """Draft a block, verify it in one pass, emit what the rule's target distribution lets through; until all rows
    end.
    """
    while state.running:
        draft = propose(state)
        emit(state, verify(state, draft), draft)


def propose(state: DecodingState) -> Draft:
    """A block of up to ``num_draft_tokens`` per row, one less than the row may still emit."""
    drafts = state.rule.drafts
    limits = [min(state.num_draft_tokens, room - 1) if drafts else 0 for room in state.tokens.room]
    return state.proposer.propose(limits, state.exact)


def verify(state: DecodingState, draft: Draft) -> VerifiedBlock:
    """Score the block with the verifier in one pass and let the rule decide."""
    distributions, depth = state.distributions, draft.depth
    logits = state.verifier.feed(ahead=depth, keep=depth + 1).to(state.tokens.device)
    decision = distributions.decision(logits, state.tokens, 0, draft.drafted)
    sampling = distributions.sampling(logits, decision, state.tokens, 0, draft.drafted)
    block = on_host(_verdict(state, draft, decision, sampling), draft, state.ends)
    raise_fault(state.rule, block.faults)
    if state.token_log is not None:
        state.token_log.block(state, draft, decision, block)
    return block


def _verdict(state: DecodingState, draft: Draft, decision: Tensor, sampling: Tensor | None) -> Verdict:
    # Without a draft nothing can be kept, so that there is nothing to charge.
    limit = state.settings.max_request_loss if draft.columns else None
    lengths = draft.lengths
    if limit is not None:  # what stands behind an end is never emitted, and must not be charged
        lengths = state.ends.lengths(draft.tokens, lengths)
    return verify_block(
        state.rule,
        draft.tokens,
        draft.logits,
        decision,
        temperature=state.distributions.temperature,
        drafter_sampling_logits=draft.sampling,
        verifier_sampling_logits=sampling,
        lengths=lengths,
        bonus=state.settings.bonus if state.rule.drafts else "verifier",
        generator=state.generator,
        context=context_of(state, draft),
        max_request_loss=limit,
        spent=state.spent if limit is not None else None,
        check=False,
    )


def context_of(state: DecodingState, draft: Draft) -> Summary | None:
    """Summary fields [B, T (+1 for an exact bonus)] that logits do not give, as far as the rule asks for
    them.
    """
    if not state.context_fields:
        return None
    columns, depth = draft.columns, draft.depth
    given: dict[str, Tensor | None] = dict(previous_tokens(state, columns))
    place = torch.arange(columns, device=state.tokens.device)[None].expand(len(draft.tokens), -1)
    given["draft_position"] = place
    if "position" in state.context_fields:
        given["position"] = place + generated(state)[:, None]
    if "drafter_hidden" in state.context_fields:
        given["drafter_hidden"] = draft.hidden
    if "verifier_hidden" in state.context_fields:
        given["verifier_hidden"] = state.verifier.hidden(depth + 1)[:, :columns]
    if "verifier_hidden_at_token" in state.context_fields:
        given["verifier_hidden_at_token"] = state.verifier.hidden(depth + 1)[:, 1:]
    return Summary({name: value for name in state.context_fields if (value := given[name]) is not None})


def generated(state: DecodingState) -> Tensor:
    """Tokens that each running row has emitted, [B] int64."""
    tokens = state.tokens
    return on_device([length - tokens.prompt_length for length in tokens.lengths], tokens.device)


def previous_tokens(state: DecodingState, columns: int) -> dict[str, Tensor]:
    """Tokens before each of the next ``columns`` places, [B, columns] by field, as far as the rule asks for them."""
    return {
        name: state.tokens.previous(back, columns)
        for back, name in enumerate(PREVIOUS_TOKENS, start=1)
        if name in state.context_fields
    }


def emit(state: DecodingState, block: VerifiedBlock, draft: Draft) -> None:
    """Append what stands and the correction or bonus; cut at ends and limits; let finished rows leave."""
    tokens = state.tokens
    tokens.put_last(block.emitted)
    offered = [len(new) for new in block.emitted]
    counts, done = state.ends.cut(tokens, block.emitted, offered, state.together)
    calls = draft.calls
    if calls is None:
        calls = [proposed + 1 for proposed in block.proposed] if state.exact else block.proposed
    state.stats.block(tokens.rows, counts, calls, block)
    state.proposer.observe(block.proposed, block.accepted)
    advance(state, counts, done, block.spent)


def advance(state: DecodingState, counts: list[int], done: list[bool], spent: Tensor | None = None) -> None:
    """Rows grow by ``counts`` tokens already written; finished ones leave the batch."""
    tokens = state.tokens
    before = tokens.final_lengths[0]
    tokens.extend(counts)
    for model in state.active:
        model.settle()
    if spent is not None and state.stats.spent is not None:
        state.spent = spent
        state.stats.spent[tokens.index] = spent
    if state.token_streamer is not None:
        state.token_streamer.put(tokens.ids[0, before : tokens.final_lengths[0]].cpu())
    if any(done):
        _leave(state, [place for place, over in enumerate(done) if not over])


def _leave(state: DecodingState, kept: list[int]) -> None:
    tokens = state.tokens
    index = on_device(kept, tokens.device)
    tokens.keep_rows(kept, index)
    if state.spent is not None:
        state.spent = state.spent.index_select(0, index)
    if kept:
        for model in state.active:
            model.keep_rows(kept, index)
