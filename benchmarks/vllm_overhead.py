"""What the plug-in adds to a step: the verdict with its head, and trace logging of a tenth of the requests.

A part of vllm_serving.py. Two pairs: the trained one, whose steps take milliseconds, and one of random weights whose
verifier has 12 layers of 768. Shares are of whole decoding steps (from one step with drafts to the next: scheduling,
both models, sampling and ourselves), greedy. They are gross: all that the plug-in spends in the engine's thread. The
engine's own rejection sampler, which the verdict stands in for, is given beside it. Logging is measured in pairs of
runs, with and without, every tenth request logged.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.vllm_engines import CONCURRENCY, ask, make_large, paired, prompts_of, start, stop, use
from deferral_train.serving import requests

TOKENS = {"trained": {1: 48, 8: 48, 32: 48}, "12 layers of 768": {1: 24, 8: 12, 32: 8}}
LOGGED = (1, 10, 30)  # requests at once; of each ten one is logged


class Clock:
    """Times of an engine's steps with drafts, and of its own rejection sampler, taken on its objects."""

    def __init__(self, llm: Any) -> None:
        from vllm.v1.sample.rejection_sampler import RejectionSampler

        self.steps: list[float] = []
        self.sampler: list[float] = []
        self._last: float | None = None
        worker = llm.llm_engine.model_executor.driver_worker.worker
        seam = worker.model_runner.rejection_sampler.seam
        note, forward = seam.note, RejectionSampler.forward

        def timed_note(state: Any) -> None:
            now = time.perf_counter()
            if self._last is not None:
                self.steps.append(now - self._last)
            self._last = now if state.scheduler_output.scheduled_spec_decode_tokens else None
            note(state)

        def timed_forward(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return forward(*arguments)
            finally:
                self.sampler.append(time.perf_counter() - began)

        seam.note = timed_note
        self._undo = lambda: setattr(RejectionSampler, "forward", forward)
        RejectionSampler.forward = timed_forward

    def begin(self) -> None:
        self.steps, self.sampler, self._last = [], [], None

    def close(self) -> None:
        self._undo()


def overhead(pair: Path, head: str, scratch: Path, rules: list[str], rounds: int) -> dict[str, Any]:
    """Shares of verdicts and logging, by pair."""
    pairs = {"trained": pair, "12 layers of 768": make_large(scratch / "large")}
    found = {}
    for name, folder in pairs.items():
        llm = start(folder, {"log": {"folder": str(scratch / f"log-{name[:2]}"), "fraction": 0.1}})
        rounds_here = rounds if name == "trained" else 2
        rows = prompts_of(folder, 4 * max(CONCURRENCY))
        logged = logging(llm, rows, TOKENS[name], rounds_here)
        llm.llm_engine.model_executor.driver_worker.worker.model_runner.rejection_sampler.seam.logger = None
        found[name] = {
            "verdicts": verdicts(llm, rows, head, rules, TOKENS[name], rounds_here),
            "logging": logged,
        }
        stop(llm)
    return found


def verdicts(
    llm: Any, rows: list[list[int]], head: str, rules: list[str], tokens: dict[int, int], rounds: int
) -> dict[str, Any]:
    """Mean milliseconds of verdict and step, by concurrency and rule; in turn, round by round."""
    clock = Clock(llm)
    modes = {
        "engine": {"rule": "lossless"},
        **{spec: {"rule": spec} for spec in rules},
        "head": {"head": head},
    }
    found: dict[str, Any] = {}
    for concurrency in CONCURRENCY:
        seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in modes}
        for _ in range(rounds + 1):
            for name, settings in modes.items():
                seam = use(llm, settings)
                seam.requests.mismatch = []  # the head was fitted on the trained pair; here its cost is asked for
                clock.begin()
                ask(llm, rows[:concurrency], tokens[concurrency])
                steps = max(1.0, seam.counters.get("steps"))
                seen[name].append(
                    (
                        1e3 * seam.counters.get("verdict_seconds") / steps,
                        1e3 * seam.counters.get("head_seconds") / steps,
                        1e3 * statistics.fmean(clock.steps),
                    )
                )
                if name == "engine":
                    seen[name][-1] = (1e3 * statistics.fmean(clock.sampler), 0.0, seen[name][-1][2])
        for name, runs in seen.items():
            verdict, of_head, step = (statistics.median(column) for column in zip(*runs[1:]))
            found[f"{concurrency} {name}"] = {
                "verdict_ms": verdict,
                "head_ms": of_head,
                "step_ms": step,
                "share": statistics.median(run[0] / run[2] for run in runs[1:]),
            }
    clock.close()
    return found


def logging(llm: Any, rows: list[list[int]], tokens: dict[int, int], rounds: int) -> dict[str, list[float]]:
    """Time without logging over time with it, [lowest, median, highest] over rounds, by clock and concurrency."""
    seam = llm.llm_engine.model_executor.driver_worker.worker.model_runner.rejection_sampler.seam
    config, chosen = seam.config, requests.chosen
    requests.chosen = lambda name, fraction: int(name.split("-")[0]) % 10 == 0  # by a hash runs would differ
    found = {}
    try:
        for concurrency in LOGGED:
            length = tokens[min(tokens, key=lambda known: abs(known - concurrency))]
            runs: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
            for _ in range(rounds + 1):
                for name in runs:
                    if name == "off":
                        use(llm, {"rule": "lossless"})
                    else:
                        seam.adopt(config, config.make_rule())
                    wall = cpu = 0.0
                    for first in range(0, max(10, concurrency), concurrency):
                        _, more, spent = ask(llm, rows[first : first + concurrency], length)
                        wall, cpu = wall + more, cpu + spent
                    runs[name].append({"wall": wall, "cpu": cpu})
            for clock in ("wall", "cpu"):
                found[f"{concurrency} {clock}"] = paired(runs["on"][1:], runs["off"][1:], clock)
    finally:
        requests.chosen = chosen
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The part as text."""
    said = []
    for pair, parts in found.items():
        said += [
            f"{pair}, {name}: {row['verdict_ms']:.2f} ms (head {row['head_ms']:.2f}) of a step of "
            f"{row['step_ms']:.1f} ms, {row['share']:.1%}"
            for name, row in parts["verdicts"].items()
        ]
        said += [
            f"{pair}, logging 10%, {name}: {middle:.3f} of the speed without ({low:.3f} to {high:.3f})"
            for name, (low, middle, high) in parts["logging"].items()
        ]
    return said
