"""vLLM's V2 model runner: verify the rows of a step that a rule is for, on the device, and settle them a step later.

The engine's own sampler decides every row first. Rows whose request has a rule are then verified by it and written
over, so that a request without one is served by the engine's code alone, whoever its neighbours are. Nothing waits for
the device: verdicts are charged there, and a copy of them is counted and logged when a later step begins.

Knows the runner by attribute. N rows of logits of a step, each request having one more than it has drafts; M rows that
a rule is for, T drafted positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.rules.summary import PREVIOUS_TOKENS
from deferral_train.serving.blocks import GREEDY_BELOW, DraftedRows, Outcome, moved, verify
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.random_numbers import block_numbers
from deferral_train.serving.requests import ServedRequest
from deferral_train.serving.seam import MakeSampler, Seam, check_parts

PARTS = ("load_model", "execute_model", "sample", "rejection_sampler", "req_states", "speculator")
ACCOUNTS = 1024  # requests that spending is kept for; more are made when they are needed


@dataclass
class EngineRows:
    """One call of the engine's verification: a step, or some requests of one whose logits are many.

    Attributes:
        logits: [N, V] as the model gave them. decision: after processors, before temperature. processed: after
            temperature and truncation; the very tensor ``logits`` where nothing was to be done.
        drafted: [N] the token that each row was fed, -1 where a draft was withdrawn; row 0 of a request is no draft.
        draft_logits: [slots, T, V] before temperature, or None.
        pos: [N] place of each row in its sequence.
        slots: of the requests, on the host.
        tokens, count: what the engine emitted, [requests, T + 1] and [requests]; written over.
    """

    logits: Tensor
    decision: Tensor
    processed: Tensor
    drafted: Tensor
    draft_logits: Tensor | None
    pos: Tensor
    slots: np.ndarray
    tokens: Tensor
    count: Tensor


@dataclass
class Members:
    """Requests of a call whose drafts are read here.

    Attributes:
        places: [M] among the requests of the call. names, requests: theirs. drafts: [M] drafted positions of each.
        first: [M] where their logits begin in the call. offset: of the call's logits within the step.
        positions: tokens generated before each drafted one [M, T], where somebody asks.
    """

    places: np.ndarray
    names: list[str]
    requests: list[ServedRequest]
    drafts: np.ndarray
    first: np.ndarray
    offset: int
    positions: Tensor | None = None

    def part(self, wanted: Sequence[bool]) -> Members:
        """Only those with a True."""
        at = np.flatnonzero(wanted)
        names, requests = [self.names[place] for place in at], [self.requests[place] for place in at]
        return Members(self.places[at], names, requests, self.drafts[at], self.first[at], self.offset)


@dataclass
class Pending:
    """Verdicts on their way to the host, or names of requests that ended after them."""

    members: Members | None = None
    outcomes: list[tuple[Outcome, Tensor]] = field(default_factory=list)  # and their copies on the way
    rows: DraftedRows | None = None
    raw: Tensor | None = None
    counted: bool = False
    event: Any = None
    ended: list[str] = field(default_factory=list)


class SeamV2(Seam):
    """The plug-in in a worker with the V2 runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pending: deque[Pending] = deque()
        self._slots: dict[int, int] = {}
        self._batch: Any = None
        self._states: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def install(self, speculative_config: Any, make_sampler: MakeSampler) -> None:
        """Replace the sampler when the runner has made its own, which is when the model is loaded.

        Raises:
            InputError: a runner, or a sampler, that is not the one we know.
        """
        runner = self.runner
        check_parts(runner, PARTS)
        load_model, sample = runner.load_model, runner.sample

        def load_model_and_replace(*args: Any, **kwargs: Any) -> Any:
            result = load_model(*args, **kwargs)
            runner.rejection_sampler = self.sampler = make_sampler(runner, speculative_config, self)
            return result

        def noted_sample(hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            if "verifier" in self.hidden:
                self._states["verifier_hidden"] = hidden_states
            return sample(hidden_states, input_batch, *args, **kwargs)

        runner.load_model, runner.sample = load_model_and_replace, noted_sample
        if hasattr(runner.speculator, "sample_draft"):
            runner.speculator.sample_draft = self._kept_draft(runner.speculator)

    def adopt(self, config: ServingConfig, rule: Any, mismatch: Sequence[str] = ()) -> None:
        self.drain()
        super().adopt(config, rule, mismatch)
        self._states = {}
        self._accounts = torch.zeros(ACCOUNTS, dtype=torch.float64, device=self.runner.device)
        self._free = list(range(ACCOUNTS))[::-1]
        self._account_of: dict[str, int] = {}

    def _kept_draft(self, speculator: Any) -> Any:
        """The speculator's drawing of one draft, keeping its hidden states by slot where somebody reads them."""
        original = speculator.sample_draft

        def sample_draft(
            hidden_states: Tensor, positions: Tensor, slots: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if "drafter" in self.hidden:
                kept = self._states.get("drafter_hidden")
                if kept is None:
                    states, width = self.runner.req_states, hidden_states.shape[-1]
                    size = (states.max_num_reqs, states.num_speculative_steps, width)
                    kept = self._states["drafter_hidden"] = hidden_states.new_zeros(size)
                kept[slots.long(), speculator.current_draft_step.view(1)] = hidden_states
            return original(hidden_states, positions, slots, *args, **kwargs)

        return sample_draft

    # What the scheduler says

    def schedule(self, scheduler_output: Any) -> None:
        """As of every runner, after the verdicts that have arrived meanwhile."""
        self._settle_arrived(late=1)
        super().schedule(scheduler_output)

    def close_requests(self, names: list[str]) -> None:
        """Free the accounts; shadow sums and traces close when the requests' last verdicts have arrived."""
        for name in names:
            account = self._account_of.pop(name, None)
            if account is not None:
                self._free.append(account)
        if self._pending:
            self._pending.append(Pending(ended=names))
        else:
            super().close_requests(names)

    # One step

    def begin(self, input_batch: Any) -> None:
        """Note the batch of the step that is being sampled."""
        self._batch = input_batch
        self._slots = {slot: row for row, slot in enumerate(input_batch.idx_mapping_np.tolist())}

    def members(self, slots: np.ndarray) -> Members | None:
        """Requests of a call that are read here; None where the engine alone decides and nobody looks on."""
        batch = self._batch
        rows = np.array([self._slots[slot] for slot in slots.tolist()])
        ends = batch.cu_num_logits_np
        drafts = ends[rows + 1] - ends[rows] - 1
        requests = [self.requests[batch.req_ids[row]] for row in rows]
        wanted = [self.reads(request) and count > 0 for request, count in zip(requests, drafts.tolist())]
        if not any(wanted):
            self.counters.add("engine_steps")
            return None
        names, offset = [batch.req_ids[row] for row in rows], int(ends[rows[0]])
        every = Members(np.arange(len(rows)), names, requests, drafts, ends[rows] - offset, offset)
        return every.part(wanted)

    def reads(self, request: ServedRequest) -> bool:
        """True for a request that has a rule or is logged."""
        return not request.idle

    def rules(self, request: ServedRequest) -> bool:
        """True for a request that a rule decides."""
        return request.ruled

    def decide(self, members: Members, engine: EngineRows) -> None:
        """Verify what a rule is for and write the verdicts over the engine's own; charge them; copy them for later."""
        began = time.perf_counter()
        ruled = members.part([self.rules(request) for request in members.requests])
        watched = members.part([not self.rules(request) for request in members.requests])
        if ruled.names:
            self.counters.add("steps")
            rows, index = self._rows(ruled, engine)
            served = shadow = self._verdicts(ruled, rows, index, engine)
            if self.shadow:
                served = self._engines(rows, index, engine)
            else:
                _write(served, rows.drafted, index[:, 0], engine)
            self._keep(
                ruled, rows, index, engine, [served, shadow] if self.shadow else [served], counted=True
            )
        else:
            self.counters.add("engine_steps")
        self.counters.add("shadow_seconds" if self.shadow else "verdict_seconds", time.perf_counter() - began)
        if watched.names:
            rows, index = self._rows(watched, engine)
            self._keep(watched, rows, index, engine, [self._engines(rows, index, engine)], counted=False)

    def _verdicts(self, members: Members, rows: DraftedRows, index: Tensor, engine: EngineRows) -> Outcome:
        """The rule's verdicts, charged to the requests' accounts."""
        settings = [request.settings for request in members.requests]
        numbers = None
        if any(temperature >= GREEDY_BELOW for temperature in rows.temperatures):
            seeds = self.sampler.sampler.sampling_states.seeds.gpu[index[:, 1]]
            numbers = block_numbers(seeds, engine.pos[index[:, 4:]])
        spent = self._accounts.index_select(0, index[:, 2])
        outcome = verify(rows, settings, numbers, spent)
        self._accounts.index_add_(0, index[:, 2], outcome.loss)
        return outcome

    @staticmethod
    def _engines(rows: DraftedRows, index: Tensor, engine: EngineRows) -> Outcome:
        at = index[:, 0]
        return Outcome.of_tokens(rows.lengths, rows.drafted.shape[1], engine.tokens[at], engine.count[at])

    def _rows(self, members: Members, engine: EngineRows) -> tuple[DraftedRows, Tensor]:
        """Logits and drafts, and an index [M, 4 + T+1] on the device: place, slot, account, drafts, logits."""
        device, drafts = engine.logits.device, int(members.drafts.max())
        steps = np.minimum(np.arange(drafts + 1), members.drafts[:, None])
        slots = engine.slots[members.places]
        accounts = np.array([self._account(name) for name in members.names])
        at = members.first[:, None] + steps
        index = moved(
            np.column_stack([members.places, slots, accounts, members.drafts, at]), torch.int64, device
        )
        flat = index[:, 4:]
        place = torch.arange(drafts, device=device)
        drafted = engine.drafted[flat[:, 1:]].long()
        there = (drafted >= 0) & (place < index[:, 3:4])
        lengths = there.long().cumprod(dim=1).sum(dim=1)
        temperatures = [request.temperature for request in members.requests]
        plain = engine.processed is engine.logits
        drafter = None
        if engine.draft_logits is not None:
            drafter = _wide(engine.draft_logits[index[:, 1], :drafts].float(), engine.logits.shape[1])
        members.positions = self._positions(index, engine)
        rows = DraftedRows(
            drafted,
            lengths,
            engine.decision[flat],
            temperatures,
            drafter,
            [drafter is not None] * len(members.names),
            None if plain else engine.processed[flat],
            self._context(members, index, drafted),
            bonus=True,
        )
        return rows, index

    def _account(self, name: str) -> int:
        """Where the spending of a request is kept on the device, opened at zero when it is first asked for."""
        if name not in self._account_of:
            if not self._free:
                size = len(self._accounts)
                self._accounts = torch.cat([self._accounts, torch.zeros_like(self._accounts)])
                self._free = list(range(size, 2 * size))[::-1]
            account = self._account_of[name] = self._free.pop()
            self._accounts[account] = 0.0
        return self._account_of[name]

    def _positions(self, index: Tensor, engine: EngineRows) -> Tensor | None:
        """Tokens generated before each drafted one [M, T], where somebody asks."""
        if not self.wants_positions:
            return None
        prompts = self.runner.req_states.prompt_len.gpu[index[:, 1]].long()
        return engine.pos[index[:, 4:-1]] + 1 - prompts.unsqueeze(1)

    def _context(self, members: Members, index: Tensor, drafted: Tensor) -> dict[str, Tensor]:
        """Summary fields [M, T, ..] that logits do not give, as far as the rule or the log asks for them."""
        slots = index[:, 1]
        context = self.place_context(
            members.positions, drafted, lambda: self._last_tokens(slots, len(PREVIOUS_TOKENS))
        )
        if "drafter" in self.hidden and "drafter_hidden" in self._states:
            context["drafter_hidden"] = self._states["drafter_hidden"][slots, : drafted.shape[1]]
        if "verifier" in self.hidden:
            at = self._batch.logits_indices[index[:, 4:-1] + members.offset]
            context["verifier_hidden"] = self._states["verifier_hidden"][at]
        return context

    def _last_tokens(self, slots: Tensor, back: int) -> Tensor:
        """The last ``back`` tokens that each request has generated, [M, back], -1 where there are fewer."""
        states = self.runner.req_states
        prompts, ends = states.prompt_len.gpu[slots].long(), states.total_len.gpu[slots].long()
        at = ends.unsqueeze(1) + torch.arange(-back, 0, device=slots.device)
        tokens = states.all_token_ids.gpu[slots.unsqueeze(1), at.clamp(min=0)].long()
        return torch.where(at >= prompts.unsqueeze(1), tokens, -1)

    # What comes a step later

    def _keep(
        self, members: Members, rows: DraftedRows, index: Tensor, engine: EngineRows, outcomes: list[Outcome],
        counted: bool,
    ) -> None:  # fmt: skip
        """Begin the copy of verdicts to the host; what was verified is kept for requests that are logged."""
        logged = self.logger is not None and any(request.logged for request in members.requests)
        pending = Pending(members, counted=counted)
        for outcome in outcomes:
            packed = outcome.packed()
            if packed.device.type == "cuda":
                copy = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
                packed = copy.copy_(packed, non_blocking=True)
            pending.outcomes.append((outcome, packed))
        if engine.logits.device.type == "cuda":
            pending.event = torch.cuda.Event()
            pending.event.record()
        if logged:
            pending.rows, pending.raw = rows, engine.logits[index[:, 4:-1]]
        self._pending.append(pending)

    def _settle_arrived(self, late: int) -> None:
        """Settle verdicts in their order; of those that are still under way ``late`` steps are left alone."""
        while self._pending:
            first = self._pending[0]
            if first.event is not None and not first.event.query():
                if sum(pending.members is not None for pending in self._pending) <= late:
                    return
                first.event.synchronize()
            self._pending.popleft()
            self._settle_one(first)

    def _settle_one(self, pending: Pending) -> None:
        if pending.members is None:
            super().close_requests(pending.ended)
            return
        served, *shadow = [outcome.unpacked(packed) for outcome, packed in pending.outcomes]
        if pending.counted:
            self.settle(pending.members, served, shadow[0] if shadow else None, pending.rows, pending.raw)
        else:
            self.log_blocks(pending.members, served, pending.rows, pending.raw)

    def drain(self) -> None:
        """Settle everything that is under way."""
        self._settle_arrived(late=0)


def _write(outcome: Outcome, drafted: Tensor, at: Tensor, engine: EngineRows) -> None:
    """Put verdicts in the place of what the engine emitted for the requests ``at`` [M] of the call."""
    width = engine.tokens.shape[1]
    tokens = torch.nn.functional.pad(drafted.clamp(min=0), (0, width - drafted.shape[1]))
    tokens = tokens.scatter(1, outcome.accepted.unsqueeze(1), outcome.correction.unsqueeze(1))
    engine.tokens.index_copy_(0, at, tokens.to(engine.tokens.dtype))
    engine.count.index_copy_(0, at, (outcome.accepted + 1).to(engine.count.dtype))


def _wide(logits: Tensor, vocabulary: int) -> Tensor:
    """A drafter's logits [.., V'] over the verifier's vocabulary: tokens that it does not know are never drafted."""
    missing = vocabulary - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits
