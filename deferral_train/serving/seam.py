"""The plug-in in one vLLM worker, whatever its runner: what it knows of requests, and what becomes of verdicts.

runner_v1.py and runner_v2.py read a step of the engine and decide it with blocks.py; here requests are met and
forgotten as the scheduler says, and verdicts are charged, counted and logged. R rows with drafts, T drafted positions,
V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Rule
from deferral_train.rules.summary import PREVIOUS_TOKENS
from deferral_train.serving.blocks import DraftedRows, Outcome
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import Counters, with_timed_head
from deferral_train.serving.layout import previous_tokens
from deferral_train.serving.requests import Requests, ServedRequest
from deferral_train.serving.shadow import Shadow
from deferral_train.serving.tally import tally

log = logging.getLogger("vllm.deferral_train")  # below vllm's logger, so that the engine formats it
WARM_UP = "_warmup_"  # ids of requests that the engine sends through itself before it serves


# Of runner, speculative_config and seam. Samplers are subclasses of vLLM's, which is imported only where it runs.
MakeSampler = Callable[[Any, Any, Any], Any]


class DecidedStep(Protocol):
    """Rows of a step as its verdicts are told of: ids, states, tokens generated before each drafted one [R, T]."""

    names: list[str]
    requests: list[ServedRequest]
    positions: Tensor | None


class Seam:
    """The plug-in in one vLLM worker.

    Args:
        runner: vLLM's model runner.
        config, rule: the plug-in's settings and its rule.
        mismatch: why the rule's head is not for this pair.
        counters: where to count.
        logger: trace logger, None where nothing is logged here.
        seed: of random streams for requests without a seed of their own; the same on every rank.
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
        self.seed = seed
        self.adopt(config, rule, mismatch)
        self.sampler: Any = None
        self.watch: Callable[[Sequence[str], Outcome], None] | None = None  # is told of every step's verdicts
        self.wanted, self.consulted = 0, 0  # blocks of requests with a rule, and those that it decided
        self._closed = False

    def install(self, speculative_config: Any, make_sampler: MakeSampler) -> None:
        """Put the plug-in into the runner; each kind of runner has its own way."""
        raise NotImplementedError

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

    # What the scheduler says

    def schedule(self, scheduler_output: Any) -> None:
        """Take in a step before it runs: requests that ended, new ones, blocks that were drafted for a rule.

        Raises:
            RuntimeError: our sampler is not in place.
        """
        if self.runner.rejection_sampler is not self.sampler:
            raise RuntimeError(
                "deferral: the engine's rejection sampler was replaced after start; no rule is in force"
            )
        self.finish(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            self.admit(new)
        drafted = scheduler_output.scheduled_spec_decode_tokens
        self.wanted += sum(self.requests[name].ruled for name in drafted)

    def admit(self, new: Any) -> None:
        """Meet a request, as the scheduler hands it to the runner; one that was preempted is known already.

        Args:
            new: vLLM's ``NewRequestData``.
        """
        name, params = new.req_id, new.sampling_params
        if params is None or name in self.requests or name.startswith(WARM_UP):
            return
        request = self.requests.of(name, params.temperature, params.extra_args)
        request.prompt_length = new.prompt_len
        self.counters.add("requests")
        if request.refused is not None:
            self.counters.add(f"refused_{request.refused}")
        elif self.requests.conditions:
            self.counters.add("uncertified")
        if self.logger is not None and request.logged:
            try:
                self.logger.started(name, new, request.name)
            except Exception:
                self._log_fault("a prompt was not logged; its request is not affected")

    def finish(self, names: Iterable[str]) -> None:
        """Forget requests that the engine no longer holds."""
        self.close_requests(self.requests.forget(names))

    def close_requests(self, names: list[str]) -> None:
        """Tell shadow mode's sums and the traces that these requests are complete."""
        self.shadow_sums.finished(names)
        if self.logger is not None:
            self.logger.finished(names)

    # What a runner's step reads

    @property
    def wants_positions(self) -> bool:
        """True where the rule or the traces read how many tokens stand before a drafted one."""
        return self.logger is not None or "position" in self.rule.needs

    def place_context(
        self, positions: Tensor | None, drafted: Tensor, before: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Summary fields [R, T] of places and previous tokens, as far as the rule reads them.

        Args:
            positions: tokens generated before each drafted one [R, T]; None where nobody asks.
            drafted: [R, T].
            before: gives the last generated tokens, [R, as many as there are such fields]; asked where they are read.
        """
        context = {}
        if positions is not None and "position" in self.rule.needs:
            context["position"] = positions
        if self.previous:
            found = previous_tokens(before(), drafted)
            context |= {
                name: found[back] for back, name in enumerate(PREVIOUS_TOKENS) if name in self.previous
            }
        return context

    # What becomes of verdicts

    def settle(
        self,
        step: DecidedStep,
        served: Outcome,
        shadow: Outcome | None,
        rows: DraftedRows | None,
        raw: Tensor | None,
    ) -> None:
        """Charge, count and log a step's verdicts.

        Args:
            served, shadow: on the host; ``shadow`` is what the rule would have done, None where it was served.
            rows, raw: what was verified, and the verifier's logits [R, T, V] as the model gave them, for the traces.
        """
        if self.watch is not None:
            self.watch(step.names, served)
        lengths = served.lengths.numpy()
        tally(self.counters, lengths, served, "")
        if shadow is not None:
            tally(self.counters, lengths, shadow, "shadow_")
            settings = [request.settings for request in step.requests]
            self.shadow_sums.add(step.names, settings, served, shadow)
        self._charge(step.requests, served if shadow is None else shadow)
        self.log_blocks(step, served, rows, raw)

    def _charge(self, requests: Sequence[ServedRequest], outcome: Outcome) -> None:
        wanted = sum(request.ruled for request in requests)
        self.consulted += wanted - len(outcome.unlawful)
        for name, rows in (("drafter_law", outcome.unlawful), ("fault", outcome.faults)):
            if rows:
                self.counters.add(f"refused_{name}", len(rows))
        guard, after = self.config.guard, self.config.guard_after
        columns = (outcome.loss.tolist(), outcome.spent.tolist(), outcome.accepted.tolist())
        for request, loss, spent, accepted in zip(requests, *columns):
            limit = request.settings.limit
            if limit is not None and spent >= limit:
                self.counters.add("limited")
            if loss:
                request.spend(loss)
            request.judged += accepted + 1
            if guard is not None and request.refused is None and request.leaves(guard, after):
                request.refuse("guard")
                self.counters.add("refused_guard")

    def log_blocks(
        self, step: DecidedStep, outcome: Outcome, rows: DraftedRows | None, raw: Tensor | None
    ) -> None:
        """Hand the blocks of logged requests to the writing thread; never raises."""
        if self.logger is None or rows is None or raw is None:
            return
        try:
            places = [place for place, request in enumerate(step.requests) if request.logged]
            if places:
                self.logger.take(step, rows, outcome, raw, places)
        except Exception:
            self._log_fault("trace logging failed for one step; requests are not affected")

    def _log_fault(self, text: str) -> None:
        self.counters.add("log_faults")
        log.exception("deferral: %s", text)

    def drain(self) -> None:
        """Settle what is still under way, on a runner whose verdicts reach the host a step later."""

    def close(self) -> None:
        """Finish the traces; a rule that was never consulted is an error.

        Raises:
            RuntimeError: see `check_consulted`.
        """
        if self._closed:
            return
        self._closed = True
        self.drain()
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


def check_parts(runner: Any, wanted: Sequence[str]) -> None:
    """Refuse a runner that has not the parts we work with.

    Raises:
        InputError: naming the runner and what it lacks.
    """
    missing = [name for name in wanted if not hasattr(runner, name)]
    if missing:
        raise InputError(
            f"deferral: this engine's {type(runner).__name__} has no {', '.join(missing)}; "
            "use a tested version of vLLM, or leave additional_config['deferral'] out"
        )
