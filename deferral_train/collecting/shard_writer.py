"""The writing side: a thread that measures, gathers and writes while the models go on.

On a GPU the measuring is queued behind the forward pass and only its results travel; on a CPU the thread does
it, so that a second core takes it off the models' back.

The queue is short, so that memory is bounded however slow the disk is. A failure of the thread is raised in
the main thread, at the next hand-over.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.collecting.batches import Scored, TraceRows
from deferral_train.traces import Chunk, TraceWriter

WAITING = 2  # batches between the models and the writer; on a CPU each holds both models' logits


@dataclass(frozen=True)
class _Handed:
    chunk: Chunk
    work: TraceRows | Scored
    copied: Any | None  # CUDA event: the host copies are complete


class ShardWriterThread:
    """Takes rows batch by batch, chunk after chunk, and writes each chunk when it is complete.

    Args:
        writer: for this process.
        measure: from a scored batch to rows.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, writer: TraceWriter, measure: Callable[[Scored], TraceRows]) -> None:
        self.writer, self.measure, self.bytes = writer, measure, 0
        self._queue: queue.Queue[_Handed | None] = queue.Queue(maxsize=WAITING)
        self._parts: list[TraceRows] = []
        self._failure: BaseException | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trace-writer", daemon=True)
        self._thread.start()

    def put(self, chunk: Chunk, scored: Scored) -> None:
        """Hand over the next batch of a chunk; device tensors start their way to the host without waiting."""
        self._raise_failure()
        if scored.rows.device.type == "cpu":
            self._queue.put(_Handed(chunk, scored, None))
        else:
            self._queue.put(_Handed(chunk, *_to_host(self.measure(scored))))

    def drain(self) -> None:
        """Wait until everything handed over so far is gathered or written."""
        self._queue.join()
        self._raise_failure()

    def close(self) -> None:
        """Write what is complete and end the thread; raises what it failed on."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise_failure()

    def abandon(self) -> None:
        """End the thread without writing unfinished chunks: what a resumed run collects again."""
        self._abandoned.set()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self) -> None:
        """Goes on taking batches after a failure, so that nobody waits on a full queue for ever."""
        failed = False
        while (handed := self._queue.get()) is not None:
            if not failed and not self._abandoned.is_set():
                try:
                    self._take(handed)
                except BaseException as error:
                    self._failure, failed = error, True
            self._queue.task_done()
        self._queue.task_done()

    @torch.inference_mode()
    def _take(self, handed: _Handed) -> None:
        if handed.copied is not None:
            handed.copied.synchronize()
        work = handed.work
        self._parts.append(self.measure(work) if isinstance(work, Scored) else work)
        if len(self._parts) == len(handed.chunk.batches):
            columns, nonfinite = gather(self._parts)
            self._parts = []
            record = self.writer.write(handed.chunk, columns, nonfinite)
            self.bytes += record.bytes


def _to_host(rows: TraceRows) -> tuple[TraceRows, Any]:
    """Copies on the host; from CUDA to pinned memory, beside the next forward pass, with what tells when they are
    complete.
    """
    beside = rows.finite.device.type == "cuda"

    def copy(tensor: Tensor) -> Tensor:
        if not beside:
            return tensor.cpu()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    columns = {name: copy(tensor) for name, tensor in rows.columns.items()}
    suspects = {name: copy(tensor) for name, tensor in rows.suspects.items()}
    host = TraceRows(columns, copy(rows.finite), suspects)
    if not beside:
        return host, None
    event = torch.cuda.Event()
    event.record()
    return host, event


def gather(parts: list[TraceRows]) -> tuple[dict[str, np.ndarray], list[tuple[int, int, str]]]:
    """A chunk's columns ordered by (prompt, position), and the places left out: (prompt, position, model)."""
    columns = {name: torch.cat([part.columns[name] for part in parts]).numpy() for name in parts[0].columns}
    finite = torch.cat([part.finite for part in parts]).numpy()
    order = np.lexsort((columns["position"], columns["prompt"]))
    kept = order[finite[order]]
    nonfinite: list[tuple[int, int, str]] = []
    if len(kept) < len(order):
        who, places = _names(parts), zip(columns["prompt"].tolist(), columns["position"].tolist())
        named = [(*place, name) for place, name in zip(places, who)]
        nonfinite = [named[row] for row in order[~finite[order]]]
    return {name: values[kept] for name, values in columns.items()}, nonfinite


def _names(parts: list[TraceRows]) -> list[str]:
    """Which models gave NaN or infinite logits, for every row of a chunk."""
    names: list[str] = []
    for part in parts:
        for row in range(len(part.finite)):
            guilty = [role for role, flags in part.suspects.items() if bool(flags[row])]
            names.append(" and ".join(guilty) or "drafter and verifier")
    return names
