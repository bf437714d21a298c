"""Console of a collect run: beforehand how much it will be, then how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from deferral_train.collecting.plan import CollectionPlan, announcement, refuse_small_disk, size_text


class Progress:
    """Announcement and bar of the first process.

    Args:
        plan: the work.
        out: trace folder.
        done: chunks finished by earlier runs.
        processes: how many share the rest.
    """

    def __init__(self, plan: CollectionPlan, out: str, done: set[int], processes: int) -> None:
        self.plan, self.out, self.done, self.processes = plan, out, done, processes
        self._bar: Any | None = None

    def begin(self, work: Sequence[tuple[Any, Any]], collector: Callable[..., Any]) -> None:
        """Time one batch, say what lies ahead, start the bar.

        Args:
            work: this process's batches, each with its chunk.
            collector: makes the rows of one of them.
        """
        seconds = self._seconds_per_token(work, collector)
        tqdm.write(announcement(self.plan, self.out, self.done, seconds))
        mine = sum(self.plan.rows[number] for number in {chunk.id for chunk, _ in work})
        label = "collect" if self.processes == 1 else f"collect (process 1 of {self.processes})"
        self._bar = tqdm(total=mine, desc=label, unit="tok", unit_scale=True, dynamic_ncols=True)

    def _seconds_per_token(
        self, work: Sequence[tuple[Any, Any]], collector: Callable[..., Any]
    ) -> float | None:
        """From the first batch, collected once more than needed; every batch has its own seed."""
        if not work or getattr(collector, "sequence", None) is not None:  # whose cost a first look tells
            return None
        with torch.inference_mode():
            collector(*work[0])
            start = time.perf_counter()
            rows = collector(*work[0])
            count = len(rows.finite.cpu())
        return (time.perf_counter() - start) / count / self.processes

    def advance(self, tokens: int, written: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(size_text(written), refresh=False)
            self._bar.update(tokens)

    def end(self, written: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(size_text(written))
            self._bar.close()


def check_room(plan: CollectionPlan, out: str, max_bytes: int | None) -> None:
    """Refuse early what the disk cannot hold; on-policy sizes are upper bounds and not held against it."""
    if plan.manifest.prefixes == "reference":
        size = sum(plan.chunk_bytes(number) for number in range(len(plan.rows)))
        refuse_small_disk(out, size if max_bytes is None else min(size, max_bytes))
