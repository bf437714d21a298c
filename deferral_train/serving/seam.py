"""The plug-in in one vLLM worker: picks the rows of a step that need it, verifies, counts, charges and logs them.

Knows the engine's runner by attribute; attach.py puts it there. R rows with drafts, T drafted positions, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.rules import Rule
from deferral_train.rules.summary import PREVIOUS_TOKENS
from deferral_train.serving.blocks import GREEDY_BELOW, DraftedRows, Outcome, RowSettings, verify
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import Counters, with_timed_head
from deferral_train.serving.layout import Step, previous_tokens, spread, spread_host
from deferral_train.serving.lossless_log import log_step
from deferral_train.serving.proposals import Proposals
from deferral_train.serving.requests import Requests, ServedRequest
from deferral_train.serving.shadow import Shadow
from deferral_train.serving.tally import tally

log = logging.getLogger("vllm.deferral_train")  # below vllm's logger, so that the engine formats it


class Seam:
    """The plug-in in one vLLM worker: verifies the drafted rows of each step by their rules.

    Args:
        runner: vLLM's V1 model runner.
        config, rule: the plug-in's settings and its rule.
        mismatch: why the rule's head is not for this pair.
        counters: where to count.
        logger: trace logger, None where nothing is logged here.
        seed: of the random stream for requests without a seed of their own; the same on every rank.
        label: of this engine, where this rank is the one that writes.
    """

    def __init__(
        self,
        runner: Any,
        config: ServingConfig,
        rule: Rule,
        mismatch: list[str],
        counters: Counters,
        logger: Any | None,
        seed: int,
        label: str | None = None,
    ) -> None:
        self.runner, self.counters, self.logger, self.label = runner, counters, logger, label
        self.adopt(config, rule, mismatch)
        device = runner.device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.shadow_generator = torch.Generator(device=device).manual_seed(seed + 1)
        self.sampler: Any = None
        self.wanted, self.consulted = 0, 0  # blocks of requests with a rule, and those that it decided
        self.sample_hidden: Tensor | None = None
        self._closed = False

    def adopt(self, config: ServingConfig, rule: Rule, mismatch: Sequence[str] = ()) -> None:
        """Put settings in force from the next step on; the state of all requests is dropped."""
        rule = with_timed_head(rule, self.counters)
        self.config, self.rule, self.shadow = config, rule, config.mode == "shadow"
        self.requests = Requests(config, rule, mismatch)
        wants = rule.needs | (
            {"drafter_hidden", "verifier_hidden"} if config.log and config.log.hidden else set()
        )
        self.hidden = {role for role in ("drafter", "verifier") if f"{role}_hidden" in wants}
        path = None if self.label is None else config.shadow_file
        self.shadow_sums = Shadow(path, config.spec, rule, self.label or "0")
        self.previous = [name for name in PREVIOUS_TOKENS if name in rule.needs]
        self.proposals = Proposals("drafter" in self.hidden)

    # What the runner's wrapped methods call

    def note(self, state: Any) -> None:
        """Prepare a step before its tokens are sampled: check that our sampler is in place, drop finished requests."""
        if self.runner.rejection_sampler is not self.sampler:
            raise RuntimeError(
                "deferral: the engine's rejection sampler was replaced after start; no rule is in force"
            )
        drafted = state.scheduler_output.scheduled_spec_decode_tokens
        self.wanted += sum(not self.request(name).settings.rule.is_lossless for name in drafted)
        self.sample_hidden = state.sample_hidden_states if "verifier" in self.hidden else None
        if len(self.requests) > len(self.runner.requests):
            gone = self.requests.keep_only(self.runner.requests.__contains__)
            self.shadow_sums.finished(gone)
            if self.logger is not None:
                self.logger.finished(gone)

    def wants_distributions(self) -> bool:
        """True where this batch needs the drafter's logits: to verify by a rule, to log, or to sample on the CPU."""
        batch = self.runner.input_batch
        if not batch.sampling_metadata.all_greedy and self.runner.device.type == "cpu":
            return True
        return any(not self.request(name).idle for name in batch.req_ids)

    def request(self, name: str) -> ServedRequest:
        """State of a request of the batch, made when it is first seen; counts new requests."""
        params = self.runner.requests[name].sampling_params
        before = len(self.requests)
        request = self.requests.of(name, params.temperature, params.extra_args)
        if len(self.requests) > before:
            self.counters.add("requests")
            if request.refused is not None:
                self.counters.add(f"refused_{request.refused}")
            elif self.requests.conditions:
                self.counters.add("uncertified")
            if self.logger is not None and request.logged:
                self._start_log(name, request)
        return request

    def _start_log(self, name: str, request: ServedRequest) -> None:
        """Tell the logger of a request; never raises."""
        try:
            self.logger.started(name, self.runner.requests[name], request.name)  # type: ignore[union-attr]
        except Exception:
            self.counters.add("log_faults")
            log.exception("deferral: a prompt was not logged; its request is not affected")

    # One step

    def only_logs(self, metadata: Any, sampling_metadata: Any) -> bool:
        """True where a greedy step has a trace logger and no request in it has a rule."""
        if self.logger is None or not sampling_metadata.all_greedy:
            return False
        names = self.runner.input_batch.req_ids
        asked = [self.request(names[row]) for row, count in enumerate(metadata.num_draft_tokens) if count > 0]
        return all(request.settings.rule.is_lossless for request in asked)

    def log_engine_step(self, metadata: Any, logits: Tensor, tokens: Tensor) -> None:
        """Blocks of logged requests, as the engine's own sampler decided them; never raises."""
        self.counters.add("engine_steps")
        try:
            log_step(self, metadata, logits, tokens)
        except Exception:
            self.counters.add("log_faults")
            log.exception("deferral: trace logging failed for one step; requests are not affected")

    def begin_step(self, metadata: Any, sampling_metadata: Any) -> Step | None:
        """Collect the rows of a step to be verified; None where the engine's own sampler does the same."""
        counts = metadata.num_draft_tokens
        members = [row for row, count in enumerate(counts) if count > 0]
        names = [self.runner.input_batch.req_ids[row] for row in members]
        requests = [self.request(name) for name in names]
        if all(request.idle for request in requests) and (
            sampling_metadata.all_greedy or self.runner.device.type != "cpu"
        ):
            self.counters.add("engine_steps")
            return None
        counts = [counts[row] for row in members]
        drafted = spread_host(metadata.draft_token_ids.cpu().numpy().astype(np.int64), counts)
        lengths, cut = np.array(counts), []
        if drafted.min() < 0 or min(counts) < drafted.shape[1]:
            cut = self._shorten(drafted, lengths)
        temperatures = [self.runner.requests[name].sampling_params.temperature for name in names]
        generators = sampling_metadata.generators
        return Step(
            members,
            names,
            requests,
            drafted,
            lengths,
            counts,
            temperatures,
            {place: generators[row] for place, row in enumerate(members) if row in generators},
            self._positions(metadata, names, counts),
            cut,
        )

    @staticmethod
    def _shorten(drafted: np.ndarray, lengths: np.ndarray) -> list[int]:
        """End blocks at the first id that the engine marked invalid, clear what lies beyond; which rows were cut."""
        place = np.arange(drafted.shape[1])
        invalid = (drafted < 0) & (place < lengths[:, None])
        cut = np.flatnonzero(invalid.any(axis=1))
        lengths[cut] = invalid[cut].argmax(axis=1)
        drafted[place >= lengths[:, None]] = 0
        return cut.tolist()

    def _positions(self, metadata: Any, names: list[str], counts: list[int]) -> Tensor | None:
        """Tokens generated before each drafted one [R, T], where somebody asks."""
        if self.logger is None and "position" not in self.rule.needs:
            return None
        return self.positions_of(
            spread(metadata.logits_indices[metadata.target_logits_indices], counts), names
        )

    def positions_of(self, at: Tensor, names: Sequence[str]) -> Tensor:
        """Tokens generated before each drafted one, whose logits come from the places ``at`` [R, T] of the step."""
        prompts = [self.runner.requests[name].num_prompt_tokens for name in names]
        if at.device.type == "cpu":  # a handful of numbers: as tensors they cost several times as much
            before = self.runner.positions.numpy()[at.numpy()].astype(np.int64)
            return torch.from_numpy(before + 1 - np.array(prompts)[:, None])
        positions = self.runner.positions[at].long()
        return positions + 1 - torch.tensor(prompts, device=positions.device).unsqueeze(1)

    def decide(
        self, step: Step, raw: Tensor, processed: Tensor, sampling: Tensor | None, indices: Tensor
    ) -> Outcome:
        """Verdicts of a step; charges, counts and logs them.

        Args:
            raw, processed: verifier logits [N, V] of the drafted positions, before and after logits processors.
            sampling: after temperature and truncation [N, V]; None where that is processed / temperature.
            indices: [N], rows of the step's hidden states that belong to the drafted positions.
        """
        began = time.perf_counter()
        rows = self._rows(step, processed, sampling, indices)
        settings = [request.settings for request in step.requests]
        served = [RowSettings()] * len(settings) if self.shadow else settings
        outcome = verify(rows, served, self._numbers(step, rows, self.generator, own=True))
        self.counters.add("steps")
        tally(self.counters, step.lengths, outcome, "")
        if not self.shadow:
            self._charge(step, outcome)
        self.counters.add("verdict_seconds", time.perf_counter() - began)
        if self.shadow:
            began = time.perf_counter()
            numbers = self._numbers(step, rows, self.shadow_generator, own=False)
            shadow_outcome = verify(rows, settings, numbers)
            tally(self.counters, step.lengths, shadow_outcome, "shadow_")
            self.shadow_sums.add(step.names, settings, outcome, shadow_outcome)
            self._charge(step, shadow_outcome)
            self.counters.add("shadow_seconds", time.perf_counter() - began)
        if self.logger is not None:
            self._log(step, rows, outcome, raw)
        return outcome

    def _charge(self, step: Step, outcome: Outcome) -> None:
        wanted = sum(not request.settings.rule.is_lossless for request in step.requests)
        self.consulted += wanted - len(outcome.unlawful)
        for name, rows in (("drafter_law", outcome.unlawful), ("fault", outcome.faults)):
            if rows:
                self.counters.add(f"refused_{name}", len(rows))
        losses = outcome.loss.tolist()
        for request, loss in zip(step.requests, losses):
            settings = request.settings
            if settings.limit is not None and settings.spent >= settings.limit:
                self.counters.add("limited")
            if loss:
                request.spend(loss)

    def _rows(self, step: Step, processed: Tensor, sampling: Tensor | None, indices: Tensor) -> DraftedRows:
        drafts = step.drafted.shape[1]
        distributions, states, have = self.proposals.take(step.names, drafts)
        probabilistic = self.runner.speculative_config.draft_sample_method == "probabilistic"
        lawful = [
            known and (probabilistic or temperature < GREEDY_BELOW)
            for known, temperature in zip(have, step.temperatures)
        ]
        device = self.runner.device
        return DraftedRows(
            torch.from_numpy(step.drafted).to(device),
            torch.from_numpy(step.lengths).to(device),
            spread(processed, step.counts),
            step.temperatures,
            distributions,
            lawful,
            None if sampling is None else spread(sampling, step.counts),
            self._context(step, states, indices),
            step.cut,
        )

    def _context(self, step: Step, states: Tensor | None, indices: Tensor) -> dict[str, Tensor]:
        """Summary fields [R, T, ..] that logits do not give, as far as the rule or the log asks for them."""
        context, device = {}, self.runner.device
        if step.positions is not None and "position" in self.rule.needs:
            context["position"] = step.positions
        if self.previous:
            said = [self.runner.requests[name].output_token_ids for name in step.names]
            found = previous_tokens(said, step.drafted, len(PREVIOUS_TOKENS))
            for back, name in enumerate(PREVIOUS_TOKENS):
                if name in self.previous:
                    context[name] = torch.from_numpy(found[back]).to(device)
        if states is not None:
            context["drafter_hidden"] = states
        if self.sample_hidden is not None:
            context["verifier_hidden"] = spread(self.sample_hidden[indices], step.counts)
        return context

    def _numbers(self, step: Step, rows: DraftedRows, generator: torch.Generator, own: bool) -> Tensor | None:
        """Random numbers [R, T+1]; a row with a seed has its own stream, whoever its neighbours are."""
        if all(temperature < GREEDY_BELOW for temperature in step.temperatures):
            return None
        count, drafts = rows.drafted.shape
        numbers = torch.rand(
            count, drafts + 1, dtype=torch.float64, device=rows.drafted.device, generator=generator
        )
        for place, stream in step.generators.items() if own else ():
            length = step.counts[place]
            mine = torch.rand(length + 1, dtype=torch.float64, device=stream.device, generator=stream)
            numbers[place, :length], numbers[place, drafts] = mine[:length], mine[length]
        return numbers

    def _log(self, step: Step, rows: DraftedRows, outcome: Outcome, raw: Tensor) -> None:
        """Hand the blocks of logged requests to the writing thread; never raises."""
        try:
            places = [place for place, request in enumerate(step.requests) if request.logged]
            if places:
                self.logger.take(step, rows, outcome, spread(raw, step.counts), places)  # type: ignore[union-attr]
        except Exception:
            self.counters.add("log_faults")
            log.exception("deferral: trace logging failed for one step; requests are not affected")

    def close(self) -> None:
        """Finish the traces; a rule that was never consulted is an error.

        Raises:
            RuntimeError: see `check_consulted`.
        """
        if self._closed:
            return
        self._closed = True
        self.shadow_sums.close()
        if self.logger is not None:
            self.logger.close()
        self.check_consulted()

    def check_consulted(self) -> None:
        """Refuse a run in which the rule was never asked although blocks were drafted for it.

        Raises:
            RuntimeError: blocks of requests with the rule were drafted, and it was not asked about one of them.
        """
        if self.wanted and not self.consulted:
            message = (
                f"deferral: rule {self.config.spec} was configured and never consulted over {self.wanted} drafted "
                "blocks of requests that it was for"
            )
            log.error(message)
            raise RuntimeError(message)
