"""Traces from live traffic, in this project's format, written by a thread that never holds up a request.

The step hands over copies of the logits of logged requests and goes on; the thread turns them into columns, gathers
whole requests and writes shards. A queue that is full drops the request's traces, not the request. N rows of one
block, K candidates, V vocabulary, D hidden width.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import Counters
from deferral_train.serving.resume import continued
from deferral_train.serving.trace_columns import BlockRows, columns_of
from deferral_train.traces import Chunk, Manifest, TraceWriter
from deferral_train.traces.folder import Folder, open_folder
from deferral_train.traces.manifest import write_header

if TYPE_CHECKING:
    from deferral_train.serving.blocks import DraftedRows, Outcome
    from deferral_train.serving.seam import DecidedStep
log = logging.getLogger("vllm.deferral_train")
TOGETHER = 16  # blocks turned into columns at a time: one by one it costs several times as much
TOGETHER_ELEMENTS = 2**21  # of their logits
PROMPTS = "prompts.jsonl"  # only where the user asked for request text
CLOSING_SECONDS = 30.0
WAITING_SECONDS = 60.0  # of finished requests for a shard to fill: what a server that is killed may lose
IDLE = "\0"  # no request's name


class TraceLog:
    """Gathers blocks by request and writes the finished ones.

    Args:
        config: the plug-in's settings, with a log.
        pair: fingerprints for the manifest.
        counters: where rows, bytes, drops and faults are counted.
        label: of this engine, part of the folder's name where there are several.
        widths: hidden width by role, where hidden states are logged.

    Raises:
        InputError: the folder cannot be made or written.
    """

    def __init__(
        self,
        config: ServingConfig,
        pair: Mapping[str, Any],
        counters: Counters,
        label: str = "0",
        widths: Mapping[str, int] | None = None,
    ) -> None:
        assert config.log is not None
        self.settings, self.counters = config.log, counters
        address = self.settings.folder if label == "0" else f"{self.settings.folder.rstrip('/')}-{label}"
        self.folder: Folder = open_folder(address)
        self.vocabulary = int(pair["vocab_size"])
        self.manifest = Manifest(
            pair=dict(pair),
            prefixes=f"cascade:{'lossless' if config.mode == 'shadow' else config.spec}",
            prompt_ids=(),
            chunks=(),
            temperature=self.settings.temperature,
            top_k=min(self.settings.top_k, self.vocabulary),
            hidden=dict(widths or {}),
            settings={
                "source": "vllm",
                "fraction": self.settings.fraction,
                "mode": config.mode,
                **self.settings.settings,
            },
            provenance=provenance.collect(),
        )
        self.bytes = 0
        try:
            self.folder.make()
            if self.settings.resume:
                self.manifest, self.bytes = continued(self.folder, self.manifest)
            write_header(self.folder, self.manifest)
        except OSError as error:
            raise InputError(
                f"deferral.log.folder {address}: {error.strerror or error}; name another"
            ) from None
        self.stopped: str | None = None
        self._waiting: queue.Queue[tuple[str, BlockRows | None]] = queue.Queue()
        self._blocks_waiting = 0
        self._lock = threading.Lock()
        self._dropped: set[str] = set()
        self._names: dict[str, str] = {}
        self._used = set(self.manifest.prompt_ids)
        self._taken: list[tuple[str, BlockRows]] = []
        self._open: dict[str, list[dict[str, np.ndarray]]] = {}
        self._ready: list[tuple[str, list[dict[str, np.ndarray]]]] = []
        self._ready_rows, self._first_ready = 0, 0.0
        self._thread = threading.Thread(target=self._work, name="deferral-traces", daemon=True)
        self._thread.start()

    # Called by the engine's thread

    def started(self, name: str, state: Any, called: str | None = None) -> None:
        """Register a logged request as ``called``; its prompt is kept only where the user asked for text."""
        if called is not None:
            self._names[name] = called
        if self.settings.text:
            ids = list(getattr(state, "prompt_token_ids", None) or [])
            self.folder.append_line(PROMPTS, json.dumps({"id": name, "prompt_token_ids": ids}))

    def take(
        self, step: DecidedStep, rows: DraftedRows, outcome: Outcome, raw: Tensor, places: Sequence[int]
    ) -> None:
        """Hand over the blocks of logged requests; raw [R, T, V] are the verifier's logits as the model gave them."""
        for place in places:
            name = step.names[place]
            if (
                self.stopped
                or name in self._dropped
                or not rows.has_distribution[place]
                or rows.drafter is None
            ):
                continue
            if not self._place():
                self._drop(name)
                continue
            self._waiting.put((name, self._block(step, rows, outcome, raw, place)))

    def _place(self) -> bool:
        """Take a place in the queue; False where it is full (with ``wait`` only once the writing thread is gone)."""
        while True:
            with self._lock:
                if self._blocks_waiting < self.settings.queue:
                    self._blocks_waiting += 1
                    return True
            if not self.settings.wait or not self._thread.is_alive():
                return False
            time.sleep(0.001)

    def finished(self, names: Sequence[str]) -> None:
        """Hand over ids of requests that the engine no longer holds: their blocks are complete."""
        for name in names:
            self._waiting.put((name, None))

    def close(self) -> None:
        """Write the remaining blocks, and record that logging ended on purpose."""
        self._waiting.put(("", None))
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            log.error(
                "deferral: trace logging did not finish within %.0f s; open the folder with partial",
                CLOSING_SECONDS,
            )

    def _drop(self, name: str) -> None:
        self._dropped.add(name)
        self.counters.add("log_dropped")

    @staticmethod
    def _block(step: DecidedStep, rows: DraftedRows, outcome: Outcome, raw: Tensor, place: int) -> BlockRows:
        accepted, length = int(outcome.accepted[place]), int(rows.lengths[place])
        count = min(accepted + 1, length)
        assert rows.drafter is not None
        assert step.positions is not None
        token = rows.drafted[place, :count].clone()
        if accepted < length:
            token[accepted] = outcome.correction[place]
        hidden = {
            role: rows.context[f"{role}_hidden"][place, :count].to("cpu", copy=True)
            for role in ("drafter", "verifier")
            if f"{role}_hidden" in rows.context
        }
        return BlockRows(
            rows.drafter[place, :count].to("cpu", copy=True),
            raw[place, :count].to("cpu", copy=True),
            token.cpu(),
            step.positions[place, :count].cpu(),
            torch.arange(count),
            outcome.origin[place, :count].to("cpu", copy=True),
            hidden,
        )

    # The writing thread

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                try:
                    name, block = self._waiting.get(timeout=WAITING_SECONDS)
                except queue.Empty:
                    name, block = IDLE, None
                try:
                    if not self._handle(name, block):
                        return
                except Exception:
                    self._fault()
                    if not name:
                        return

    def _fault(self) -> None:
        self.counters.add("log_faults")
        log.exception("deferral: trace logging failed; requests are not affected")

    def _handle(self, name: str, block: BlockRows | None) -> bool:
        """Act on one queued message, or on there being none for a while; False after the last."""
        if block is not None:
            self._taken.append((name, block))
            elements = sum(taken.verifier.numel() for _, taken in self._taken)
            if len(self._taken) >= min(TOGETHER, self.settings.queue) or elements >= TOGETHER_ELEMENTS:
                self._compute()
            return True
        self._compute()
        for done in list(self._open) if not name else [name]:
            parts, called = self._open.pop(done, None), self._names.pop(done, done)
            if done in self._dropped:
                self._dropped.discard(done)
            elif parts:
                called = done if called in self._used else called  # ids of a header do not repeat
                self._used.add(called)
                self._first_ready = self._first_ready if self._ready else time.monotonic()
                self._ready.append((called, parts))
                self._ready_rows += sum(len(part["position"]) for part in parts)
        if self._ready and (not name or self._shard_is_due()):
            self._write()
        if not name and self.stopped is None:
            TraceWriter(self.folder, self.manifest).stop("the engine was shut down")
        return bool(name)

    def _shard_is_due(self) -> bool:
        """True where a shard is full, or its first request has waited so long that losing it would be a pity."""
        late = time.monotonic() - self._first_ready >= WAITING_SECONDS
        return late or self._ready_rows >= self.settings.rows_per_shard

    def _compute(self) -> None:
        """Columns of the blocks that were taken; a block that fails is lost alone."""
        taken, self._taken = self._taken, []
        with self._lock:
            self._blocks_waiting -= len(taken)
        wanted = [
            (name, block) for name, block in taken if name not in self._dropped and self.stopped is None
        ]
        if not wanted:
            return
        try:
            found = self._columns([block for _, block in wanted])
        except Exception:
            if len(wanted) == 1:
                self._fault()
                return
            found = [self._alone(block) for _, block in wanted]
        for (name, _), columns in zip(wanted, found):
            if columns is not None:
                self._open.setdefault(name, []).append(columns)

    def _alone(self, block: BlockRows) -> dict[str, np.ndarray] | None:
        try:
            return self._columns([block])[0]
        except Exception:
            self._fault()
            return None

    def _columns(self, blocks: Sequence[BlockRows]) -> Sequence[dict[str, np.ndarray] | None]:
        manifest = self.manifest
        return columns_of(
            blocks, self.vocabulary, manifest.temperature, manifest.top_k, tuple(manifest.hidden)
        )

    def _write(self) -> None:
        """Write one shard of the requests that are complete."""
        ready, self._ready, self._ready_rows = self._ready, [], 0
        if self.stopped is not None:
            return
        layout, first = self.manifest.layout, len(self.manifest.prompt_ids)
        rows = sum(len(part["position"]) for _, parts in ready for part in parts)
        if self.bytes + rows * layout.row_bytes + layout.shard_bytes > self.settings.max_bytes:
            self.stopped = f"max_bytes={self.settings.max_bytes}"
            self.counters.add("log_dropped", len(ready))
            TraceWriter(self.folder, self.manifest).stop(self.stopped)
            log.warning("deferral: trace logging stopped at its limit of %d bytes", self.settings.max_bytes)
            return
        numbers = range(first, first + len(ready))
        columns = {
            name: np.concatenate([part[name] for _, parts in ready for part in parts])
            for name in layout.columns
            if name != "prompt"
        }
        lengths = [sum(len(part["position"]) for part in parts) for _, parts in ready]
        columns["prompt"] = np.repeat(np.arange(first, first + len(ready)), lengths)
        before = self.manifest
        chunk = Chunk(len(before.chunks), 0, (tuple(numbers),))
        self.manifest = replace(
            before,
            prompt_ids=(*before.prompt_ids, *(name for name, _ in ready)),
            chunks=(*before.chunks, chunk),
        )
        try:
            # The header first: a ledger line for a chunk that the header does not know would spoil the folder.
            write_header(self.folder, self.manifest)
            record = TraceWriter(self.folder, self.manifest).write(chunk, columns)
        except BaseException:
            self.manifest, self.stopped = before, "a shard could not be written"
            with contextlib.suppress(OSError):  # where nothing can be written, this cannot either
                write_header(self.folder, before)
                TraceWriter(self.folder, before).stop(self.stopped)
            raise
        self.bytes += record.bytes
        self.counters.add("log_rows", record.rows)
        self.counters.add("log_bytes", record.bytes)
        self.counters.add("log_requests", len(ready))
