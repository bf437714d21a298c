"""vLLM's V1 model runner: read a step with drafted tokens, have it verified, keep what its drafter said.

Knows the runner by attribute. R rows with drafts, T drafted positions, V vocabulary, B requests of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.sampling import draw
from deferral_train.rules.summary import PREVIOUS_TOKENS
from deferral_train.serving.blocks import GREEDY_BELOW, DraftedRows, Outcome, RowSettings, verify
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.layout import Step, last_tokens, spread, spread_host
from deferral_train.serving.lossless_log import log_step
from deferral_train.serving.proposals import Proposals
from deferral_train.serving.seam import MakeSampler, Seam, check_parts

PARTS = (
    "rejection_sampler",
    "drafter",
    "execute_model",
    "sample_tokens",
    "_sample",
    "propose_draft_token_ids",
)


# Proposers that draw their drafts where `_kept_draft` looks on, and the one whose drafts have no logits.
PROPOSERS = ("DraftModelProposer", "EagleProposer", "NgramProposer")


class SeamV1(Seam):
    """The plug-in in a worker with the V1 runner: a sampler is replaced, methods of runner and drafter are wrapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self.runner.device
        self.generator = torch.Generator(device=device).manual_seed(self.seed)
        self.shadow_generator = torch.Generator(device=device).manual_seed(self.seed + 1)
        self.sample_hidden: Tensor | None = None

    def install(self, speculative_config: Any, make_sampler: MakeSampler) -> None:
        """Replace the sampler and wrap the methods.

        Raises:
            InputError: a runner that has not the parts we replace.
        """
        runner = self.runner
        check_parts(runner, PARTS)
        check_proposer(runner.drafter)
        runner.rejection_sampler = self.sampler = make_sampler(runner, speculative_config, self)
        _wrap_runner(runner, self)
        if hasattr(runner.drafter, "_sample_draft_tokens"):
            runner.drafter._sample_draft_tokens = _kept_draft(runner.drafter, self)

    def adopt(self, config: ServingConfig, rule: Any, mismatch: Sequence[str] = ()) -> None:
        super().adopt(config, rule, mismatch)
        self.proposals = Proposals("drafter" in self.hidden)

    # What the runner's wrapped methods call

    def note(self, state: Any) -> None:
        """Keep the hidden states of a step, where somebody reads them."""
        self.sample_hidden = state.sample_hidden_states if "verifier" in self.hidden else None

    def wants_distributions(self) -> bool:
        """True where this batch needs the drafter's logits: to verify by a rule, to log, or to sample on the CPU."""
        batch = self.runner.input_batch
        if not batch.sampling_metadata.all_greedy and self.runner.device.type == "cpu":
            return True
        return any(not self.requests[name].idle for name in batch.req_ids)

    # One step

    def only_logs(self, metadata: Any, sampling_metadata: Any) -> bool:
        """True where a greedy step has a trace logger and no request in it has a rule."""
        if self.logger is None or not sampling_metadata.all_greedy:
            return False
        names = self.runner.input_batch.req_ids
        asked = [
            self.requests[names[row]] for row, count in enumerate(metadata.num_draft_tokens) if count > 0
        ]
        return not any(request.ruled for request in asked)

    def log_engine_step(self, metadata: Any, logits: Tensor, tokens: Tensor) -> None:
        """Blocks of logged requests, as the engine's own sampler decided them; never raises."""
        self.counters.add("engine_steps")
        try:
            log_step(self, metadata, logits, tokens)
        except Exception:
            self._log_fault("trace logging failed for one step; requests are not affected")

    def begin_step(self, metadata: Any, sampling_metadata: Any) -> Step | None:
        """Collect the rows of a step to be verified; None where the engine's own sampler does the same."""
        counts = metadata.num_draft_tokens
        members = [row for row, count in enumerate(counts) if count > 0]
        names = [self.runner.input_batch.req_ids[row] for row in members]
        requests = [self.requests[name] for name in names]
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
        temperatures = [request.temperature for request in requests]
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
        if not self.wants_positions:
            return None
        return self.positions_of(
            spread(metadata.logits_indices[metadata.target_logits_indices], counts), names
        )

    def positions_of(self, at: Tensor, names: Sequence[str]) -> Tensor:
        """Tokens generated before each drafted one, whose logits come from the places ``at`` [R, T] of the step."""
        prompts = [self.requests[name].prompt_length for name in names]
        if at.device.type == "cpu":  # a handful of numbers: as tensors they cost several times as much
            before = self.runner.positions.numpy()[at.numpy()].astype(np.int64)
            return torch.from_numpy(before + 1 - np.array(prompts)[:, None])
        positions = self.runner.positions[at].long()
        return positions + 1 - torch.tensor(prompts, device=positions.device).unsqueeze(1)

    def decide(
        self, step: Step, raw: Tensor, processed: Tensor, sampling: Tensor | None, indices: Tensor
    ) -> Outcome:
        """Verdicts of a step, on the host; charges, counts and logs them.

        Args:
            raw, processed: verifier logits [N, V] of the drafted positions, before and after logits processors.
            sampling: after temperature and truncation [N, V]; None where that is processed / temperature.
            indices: [N], rows of the step's hidden states that belong to the drafted positions.
        """
        began = time.perf_counter()
        rows = self._rows(step, processed, sampling, indices)
        settings = [request.settings for request in step.requests]
        served = [RowSettings()] * len(settings) if self.shadow else settings
        outcome = verify(rows, served, self._numbers(step, rows, self.generator, own=True)).host()
        self.counters.add("steps")
        self.counters.add("verdict_seconds", time.perf_counter() - began)
        began, shadow = time.perf_counter(), None
        if self.shadow:
            numbers = self._numbers(step, rows, self.shadow_generator, own=False)
            shadow = verify(rows, settings, numbers).host()
        logged = self.logger is not None and any(request.logged for request in step.requests)
        self.settle(step, outcome, shadow, rows, spread(raw, step.counts) if logged else None)
        self.counters.add("shadow_seconds" if self.shadow else "verdict_seconds", time.perf_counter() - began)
        return outcome

    def _rows(self, step: Step, processed: Tensor, sampling: Tensor | None, indices: Tensor) -> DraftedRows:
        drafts = step.drafted.shape[1]
        distributions, states, have = self.proposals.take(step.names, drafts)
        probabilistic = self.runner.speculative_config.draft_sample_method == "probabilistic"
        lawful = [
            known and (probabilistic or temperature < GREEDY_BELOW)
            for known, temperature in zip(have, step.temperatures)
        ]
        device = self.runner.device
        drafted = torch.from_numpy(step.drafted).to(device)
        return DraftedRows(
            drafted,
            torch.from_numpy(step.lengths).to(device),
            spread(processed, step.counts),
            step.temperatures,
            distributions,
            lawful,
            None if sampling is None else spread(sampling, step.counts),
            self._context(step, drafted, states, indices),
            step.cut,
        )

    def _context(
        self, step: Step, drafted: Tensor, states: Tensor | None, indices: Tensor
    ) -> dict[str, Tensor]:
        """Summary fields [R, T, ..] that logits do not give, as far as the rule or the log asks for them."""

        def before() -> Tensor:
            said = [self.runner.requests[name].output_token_ids for name in step.names]
            return last_tokens(said, len(PREVIOUS_TOKENS)).to(drafted.device)

        context = self.place_context(step.positions, drafted, before)
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


def check_proposer(drafter: Any) -> None:
    """Refuse a proposer that draws its drafts in a way of its own.

    Raises:
        InputError: naming it, and the runner that has the logits of its drafts.
    """
    found = type(drafter).__name__
    if found not in PROPOSERS:
        raise InputError(
            f"deferral: this drafter has a proposer of its own ({found}), whose logits the V1 runner keeps to itself; "
            "start with VLLM_USE_V2_MODEL_RUNNER=1"
        )


def _wrap_runner(runner: Any, seam: SeamV1) -> None:
    sample_tokens, sample, propose = runner.sample_tokens, runner._sample, runner.propose_draft_token_ids

    def noted_sample_tokens(*args: Any, **kwargs: Any) -> Any:
        if runner.execute_model_state is not None:
            seam.note(runner.execute_model_state)
        return sample_tokens(*args, **kwargs)

    def forgetful_sample(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        seam.proposals.begin(False)  # they were for this step; a step without drafting must not find them
        return output

    def kept_propose(*args: Any, **kwargs: Any) -> Any:
        seam.proposals.begin(seam.wants_distributions())
        drafted = propose(*args, **kwargs)
        seam.proposals.finish(runner.input_batch.req_ids)
        return drafted

    runner.sample_tokens = noted_sample_tokens
    runner._sample = forgetful_sample
    runner.propose_draft_token_ids = kept_propose


def _kept_draft(drafter: Any, seam: SeamV1) -> Any:
    original = drafter._sample_draft_tokens

    def sample_draft_tokens(hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        if not seam.proposals.open:
            return original(hidden_states, sampling_metadata)
        logits = drafter.model.compute_logits(hidden_states)
        seam.proposals.add(logits, hidden_states)
        if sampling_metadata.all_greedy or not drafter._enable_probabilistic_draft_probs:
            return logits.argmax(dim=-1), None
        tokens, distribution = drafter._sample_from_logits(
            logits.clone(), sampling_metadata
        )  # which scales them in place
        if distribution is not None:
            _seeded_drafts(tokens, distribution, sampling_metadata)
        return tokens, distribution

    return sample_draft_tokens


def _seeded_drafts(tokens: Tensor, distribution: Tensor, sampling_metadata: Any) -> None:
    """Draw again the drafts [B] of sampled requests with a seed, from their own streams: the engine seeds none."""
    for row, stream in sampling_metadata.generators.items():
        if row < len(tokens) and float(sampling_metadata.temperature[row]) >= GREEDY_BELOW:
            number = torch.rand(1, dtype=torch.float64, device=stream.device, generator=stream)
            tokens[row] = draw(distribution[row : row + 1], number.to(distribution.device))[0]
