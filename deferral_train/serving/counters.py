"""Counters of a worker where dashboards find them: a small mapped file, and a Prometheus collector that reads it.

Worker processes have no way of their own to the server's ``/metrics``. Each writes its numbers to a file in a folder
that the front process made and named in the environment; the front process adds them up when it is asked. B blocks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train.rules import Rule

VARIABLE = "DEFERRAL_TRAIN_COUNTERS"
PLACES = 32  # drafted positions that are told apart; the last takes all beyond
REFUSALS = ("asked", "temperature", "pair", "options", "guard", "drafter_law", "fault")

# name -> what it counts. Served and shadow blocks have the same names.
BLOCK_COUNTERS = {
    "blocks": "drafted blocks that were verified",
    "drafted": "drafted tokens",
    "deferred": "drafted positions left to the verifier",
    "kept": "drafted tokens that stand by the rule's leave",
    "accepted": "deferred drafted tokens that passed the exact check",
    "rejected": "drafted tokens that were replaced",
    "discarded": "drafted tokens after a rejection",
    "squares": "sum over blocks of (drafted tokens that stand)^2",
    "estimated_loss": "estimated loss of the kept tokens, units of the rule's estimate",
}
OTHER_COUNTERS = {
    "steps": "engine steps with drafted tokens that this plug-in decided",
    "engine_steps": "engine steps left to the engine's own sampler, no row needing the plug-in",
    "verdict_seconds": "time spent on verdicts in the engine's thread, head and counting included",
    "head_seconds": "time spent in the head",
    "shadow_seconds": "time spent on what the rule would have done",
    "requests": "requests seen",
    "uncertified": "requests served by a head in an engine, number format or setting that it was not certified on",
    "limited": "blocks of requests that had reached their loss limit",
    "log_rows": "trace rows written",
    "log_bytes": "trace bytes written",
    "log_requests": "requests whose traces were written",
    "log_dropped": "requests whose traces were dropped",
    "log_faults": "faults of the trace logger, none of which touched a request",
}
SCALARS = (
    *BLOCK_COUNTERS,
    *(f"shadow_{name}" for name in BLOCK_COUNTERS),
    *OTHER_COUNTERS,
    *(f"refused_{reason}" for reason in REFUSALS),
)
ROWS = ("reached", "passed", "shadow_reached", "shadow_passed")  # by place in the block
SIZE = len(SCALARS) + len(ROWS) * PLACES


class Counters:
    """Numbers of one process: in memory, and in a mapped file where a folder is given."""

    def __init__(self, folder: str | None = None, label: str = "0") -> None:
        self.index = {name: place for place, name in enumerate(SCALARS)}
        self.values: Any
        if folder and Path(folder).is_dir():
            path = Path(folder) / f"{label}-{os.getpid()}.f64"
            # A plain view: every operation on a memmap object makes another one.
            self.values = np.asarray(np.memmap(path, dtype=np.float64, mode="w+", shape=(SIZE,)))
        else:
            self.values = np.zeros(SIZE, dtype=np.float64)

    def add(self, name: str, amount: float = 1.0) -> None:
        """Add ``amount`` to a counter."""
        self.values[self.index[name]] += amount

    def add_block(self, prefix: str, amounts: np.ndarray) -> None:
        """Count all of `BLOCK_COUNTERS` of one step, in their order, under names that begin with ``prefix``."""
        start = self.index[prefix + "blocks"]
        self.values[start : start + len(BLOCK_COUNTERS)] += amounts

    def add_places(self, name: str, counts: np.ndarray) -> None:
        """Count by place in the block: ``counts`` [T]."""
        start = len(SCALARS) + ROWS.index(name) * PLACES
        inside = min(len(counts), PLACES)
        self.values[start : start + inside] += counts[:inside]
        if len(counts) > PLACES:
            self.values[start + PLACES - 1] += counts[PLACES:].sum()

    def get(self, name: str) -> float:
        """A counter's value."""
        return float(self.values[self.index[name]])

    def places(self, name: str) -> list[float]:
        """A counter by place [PLACES]."""
        start = len(SCALARS) + ROWS.index(name) * PLACES
        return [float(value) for value in self.values[start : start + PLACES]]


def make_folder() -> str:
    """The folder of this engine's counters, named in the environment for the processes that it starts."""
    folder = tempfile.mkdtemp(prefix="deferral-train-")
    os.environ[VARIABLE] = folder
    return folder


def remove_folder(folder: str) -> None:
    """Delete a counter folder; called at exit of the process that made it."""
    if os.environ.get(VARIABLE) == folder:
        del os.environ[VARIABLE]
    shutil.rmtree(folder, ignore_errors=True)


def read_folder(folder: str) -> dict[str, Counters]:
    """The counters in a folder, added up by label (data-parallel engine)."""
    found: dict[str, Counters] = {}
    for path in sorted(Path(folder).glob("*.f64")):
        try:
            values = np.fromfile(path, dtype=np.float64)
        except OSError:
            continue
        if values.shape == (SIZE,):
            label = path.name.rpartition("-")[0]
            found.setdefault(label, Counters()).values += values
    return found


class Collector:
    """Prometheus collector: reads the workers' counter files on every scrape and adds them up."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def describe(self) -> list:
        """An empty list, so that registering reads no files."""
        return []

    def collect(self) -> Iterator[Any]:
        """One family per counter, labelled by engine, places and reasons by their own label."""
        from prometheus_client.core import CounterMetricFamily

        engines = read_folder(self.folder)
        described = {**BLOCK_COUNTERS, **OTHER_COUNTERS}
        described |= {f"shadow_{name}": f"shadow: {text}" for name, text in BLOCK_COUNTERS.items()}
        for name, text in described.items():
            family = CounterMetricFamily(f"deferral:{name}", text, labels=["engine"])
            for label, counters in engines.items():
                family.add_metric([label], counters.get(name))
            yield family
        reasons = CounterMetricFamily(
            "deferral:refused", "requests or blocks served lossless, by reason", labels=["engine", "reason"]
        )
        for label, counters in engines.items():
            for reason in REFUSALS:
                reasons.add_metric([label, reason], counters.get(f"refused_{reason}"))
        yield reasons
        for name in ROWS:
            family = CounterMetricFamily(
                f"deferral:{name}_by_place",
                "drafted positions by place in the block: reached by the walk, or passed",
                labels=["engine", "place"],
            )
            for label, counters in engines.items():
                for place, value in enumerate(counters.places(name)):
                    if value:
                        family.add_metric([label, str(place)], value)
            yield family


# What rules ask of a head.
ANSWERS = frozenset({"gap", "tv", "defer", "score", "truth", "verifier_value"})


class TimedHead:
    """A rule's head whose answers are timed, as counter ``head_seconds``; everything else is the head's own."""

    def __init__(self, head: Any, counters: Counters) -> None:
        self._head, self._counters = head, counters

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._head, name)
        if name not in ANSWERS or not callable(own):
            return own

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return own(*arguments)
            finally:
                self._counters.add("head_seconds", time.perf_counter() - began)

        return timed


def with_timed_head(rule: Rule, counters: Counters) -> Rule:
    """The rule with the time that its head takes counted; the rule itself where it has none."""
    head = getattr(rule, "head", None)
    if head is None or isinstance(head, TimedHead):
        return rule
    return replace(rule, head=TimedHead(head, counters))  # type: ignore[call-arg]
