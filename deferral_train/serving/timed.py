"""A rule's head as it is served: its time is counted, and of one block it is asked once.

A decision and the estimate that a block is charged with come from the same answer; heads cost more than the two reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from deferral_train.rules import Rule
from deferral_train.serving.counters import Counters

ANSWERS = ("gap", "defer", "truth", "verifier_value")


class _Watch:
    """What the answers of one head share: whether one is being computed, and the last of each."""

    def __init__(self, counters: Counters) -> None:
        self.counters, self.busy = counters, False
        self.last: dict[str, tuple[Any, tuple, Any]] = {}

    def over(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        """``answer`` watched."""

        def ask(summary: Any, *others: Any) -> Any:
            if self.busy:  # one answer asks another
                return answer(summary, *others)
            known = self.last.get(name)
            if known is not None and known[0] is summary and known[1] == others:
                return known[2]
            self.busy, began = True, time.perf_counter()
            try:
                found = answer(summary, *others)
            finally:
                self.busy = False
                self.counters.add("head_seconds", time.perf_counter() - began)
            self.last[name] = (summary, others, found)
            return found

        return ask


def watch_head(rule: Rule, counters: Counters) -> None:
    """Watch the head of a rule, if it has one, whichever of its answers the rule asks for."""
    head, watch = getattr(rule, "head", None), _Watch(counters)
    for name in ANSWERS:
        if callable(getattr(head, name, None)):
            setattr(head, name, watch.over(name, getattr(head, name)))
