"""The state of one decoding call: what every execution reads and moves on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.cached_model import CachedModel
from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.distributions import SamplingDistributions
from deferral_train.decoding.proposing import Draft, ModelProposer, Proposer
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.stats import StatsRecorder
from deferral_train.decoding.tokens import TokenRows, on_device
from deferral_train.rules.base import Rule
from deferral_train.rules.summary import CONTEXT_FIELDS, PREVIOUS_TOKENS, Summary


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
    def limits(self) -> list[int]:
        """Most tokens to draft for each running row now."""
        tokens, most = self.tokens, self.num_draft_tokens if self.rule.drafts else 0
        if self.settings.blocks == "served":
            return [most if length > tokens.prompt_length else 0 for length in tokens.lengths]
        # One token less than a row may still emit: verification adds one.
        return [min(most, room - 1) for room in tokens.room]

    @property
    def exact(self) -> bool:
        """True where the proposer is asked for the distribution after a block, too."""
        return self.settings.bonus == "exact" and self.rule.drafts

    @property
    def running(self) -> bool:
        """True while any row goes on."""
        return bool(self.tokens.rows)

    @property
    def execution(self) -> str:
        """Name of the execution: what was asked for, but the drafter alone needs no verification and runs as a token
        cascade that never defers.
        """
        alone = self.rule.name == "drafter_only" and self.settings.max_request_loss is None
        return "token" if alone and isinstance(self.proposer, ModelProposer) else self.settings.execution

    @property
    def generated(self) -> Tensor:
        """Tokens that each running row has emitted, [B] int64."""
        tokens = self.tokens
        return on_device([length - tokens.prompt_length for length in tokens.lengths], tokens.device)

    def previous_tokens(self, columns: int) -> dict[str, Tensor]:
        """Tokens before each of the next ``columns`` places, [B, columns] by field, those that the rule asks for."""
        return {
            name: self.tokens.previous(back, columns)
            for back, name in enumerate(PREVIOUS_TOKENS, start=1)
            if name in self.context_fields
        }

    def context(self, draft: Draft) -> Summary | None:
        """Summary fields [B, T (+1 for an exact bonus)] that logits do not give, as far as the rule asks for them."""
        if not self.context_fields:
            return None
        columns, depth = draft.columns, draft.depth
        given: dict[str, Tensor | None] = dict(self.previous_tokens(columns))
        place = torch.arange(columns, device=self.tokens.device)[None].expand(len(draft.tokens), -1)
        given["draft_position"] = place
        if "position" in self.context_fields:
            given["position"] = place + self.generated[:, None]
        if "drafter_hidden" in self.context_fields:
            given["drafter_hidden"] = draft.hidden
        if "verifier_hidden" in self.context_fields:
            given["verifier_hidden"] = self.verifier.hidden(depth + 1)[:, :columns]
        if "verifier_hidden_at_token" in self.context_fields:
            given["verifier_hidden_at_token"] = self.verifier.hidden(depth + 1)[:, 1:]
        return Summary({name: value for name in self.context_fields if (value := given[name]) is not None})

    def advance(self, counts: list[int], done: list[bool], spent: Tensor | None = None) -> None:
        """Rows grow by ``counts`` tokens already written; finished ones leave the batch."""
        tokens = self.tokens
        before = tokens.final_lengths[0]
        tokens.extend(counts)
        for model in self.active:
            model.settle()
        if spent is not None and self.stats.spent is not None:
            self.spent = spent
            self.stats.spent[tokens.index] = spent
        if self.token_streamer is not None:
            self.token_streamer.put(tokens.ids[0, before : tokens.final_lengths[0]].cpu())
        if not any(done):
            return
        kept = [place for place, over in enumerate(done) if not over]
        index = on_device(kept, tokens.device)
        tokens.keep_rows(kept, index)
        if self.spent is not None:
            self.spent = self.spent.index_select(0, index)
        for model in self.active if kept else ():
            model.keep_rows(kept, index)
