"""Open trace folders: whole columns as arrays, the summary as tensors, rows by prompt.

Shards are memory mapped; nothing is read before it is asked for. What is read is checked: sizes when the
folder is opened, a column's CRC-32 when it is first read, whole files (SHA-256) with ``verify=True``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from deferral_train.errors import InputError
from deferral_train.rules.summary import FIELDS, HIDDEN_FIELDS, PREVIOUS_TOKENS, Summary
from deferral_train.traces.folder import open_folder
from deferral_train.traces.history import previous_tokens
from deferral_train.traces.ledger import ChunkRecord, read_ledger
from deferral_train.traces.manifest import Manifest, read_header
from deferral_train.traces.schema import numpy_type, width
from deferral_train.traces.shard import Shard

READERS = min(4, os.cpu_count() or 1)  # threads; checking and copying release the interpreter
_SUMMARY_TYPES: dict[str, np.dtype] = {"float": np.dtype(np.float32), "int": np.dtype(np.int64)}


class Traces:
    """Token rows of a trace folder, or those of some of its prompts.

    Rows are ordered by chunk, prompt, position. Made by :func:`open_traces` and :meth:`select_prompts`.

    Attributes:
        manifest: the folder's header.
        complete: whether every chunk of the manifest is there (False after ``--max-bytes``).
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: Sequence[Shard],
        complete: bool = True,
        rows: Sequence[np.ndarray | None] | None = None,
        prompts: frozenset[int] | None = None,
    ) -> None:
        self.manifest, self.complete = manifest, complete
        self._shards = list(shards)
        self._rows: Sequence[np.ndarray | None] = rows if rows is not None else [None] * len(self._shards)
        self._prompts = prompts

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @cached_property
    def _offsets(self) -> np.ndarray:
        counts = [s.record.rows if rows is None else len(rows) for s, rows in zip(self._shards, self._rows)]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that these traces have."""
        return tuple(self.manifest.layout.columns)

    @property
    def records(self) -> tuple[ChunkRecord, ...]:
        """Ledger records of the shards that hold these rows."""
        return tuple(shard.record for shard in self._shards)

    @property
    def bytes(self) -> int:
        """Size of these shards' files."""
        return sum(record.bytes for record in self.records)

    @property
    def nonfinite(self) -> int:
        """Positions left out because a model gave NaN or infinite logits."""
        return sum(record.nonfinite for record in self.records)

    def column(self, name: str) -> np.ndarray:
        """All rows of a column: [N], or [N, K] of a list column.

        Memory mapped (read-only) where one whole shard holds all rows, else copied together.

        Raises:
            InputError: no such column, or a damaged shard, named.
        """
        kind = self._kind(name)
        shape = (-1, width(kind)) if pa.types.is_fixed_size_list(kind) else (-1,)
        if len(self._shards) == 1 and self._rows[0] is None:
            return self._shards[0].values(name).reshape(shape)
        return self._gather([name])[name].reshape(shape)

    def _kind(self, name: str) -> pa.DataType:
        columns = self.manifest.layout.columns
        if name not in columns:
            raise InputError(f"the traces have no column {name!r}; they have {', '.join(columns)}")
        return columns[name]

    def _gather(
        self, names: Iterable[str], types: Mapping[str, np.dtype] | None = None
    ) -> dict[str, np.ndarray]:
        """Columns copied together shard by shard into arrays allocated once, [N * K] each.

        Args:
            names: columns.
            types: to convert to on the way, where it is not the stored one.
        """
        kinds = {name: self._kind(name) for name in names}
        out = {
            name: _empty(len(self) * width(kind), (types or {}).get(name, numpy_type(kind)))
            for name, kind in kinds.items()
        }

        def fill(number: int) -> None:
            for name, kind in kinds.items():
                start, stop = self._offsets[number : number + 2] * width(kind)
                out[name][start:stop] = self._part(number, name, width(kind))

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, range(len(self._shards))))
        return out

    def _part(self, number: int, name: str, count: int) -> np.ndarray:
        values, rows = self._shards[number].values(name), self._rows[number]
        return values if rows is None else values.reshape(-1, count)[rows].reshape(-1)

    @cached_property
    def summary_fields(self) -> tuple[str, ...]:
        """Summary fields that these traces hold, hidden states included, and those that follow from other rows."""
        return (*(name for name in self.columns if name in FIELDS), *PREVIOUS_TOKENS)

    def summary(self, fields: Iterable[str] | None = None, temperature: float | None = None) -> Summary:
        """The summary over all rows, as float32 and int64 tensors [N] (hidden states [N, D]).

        Args:
            fields: which; None gives all that are stored but the hidden states, which must be asked for as
                the previous tokens must.
            temperature: what ``tv`` is for: None or the manifest's gives what was collected, 1 the distributions as
                they are, 0 greedy decoding (1 where the argmaxes differ).

        Raises:
            InputError: a field that is not stored, a temperature that was not collected, a damaged shard.
        """
        names = (
            [name for name in self.summary_fields if name not in {*HIDDEN_FIELDS, *PREVIOUS_TOKENS}]
            if fields is None
            else list(fields)
        )
        self._refuse_unknown(names)
        source = self._tv_source(temperature) if "tv" in names else None
        wanted = [name for name in names if name != "tv" and name not in PREVIOUS_TOKENS]
        wanted += [name for name in source or () if name not in wanted]
        arrays = self._gather(
            dict.fromkeys(wanted), {name: _SUMMARY_TYPES[FIELDS[name].dtype] for name in wanted}
        )
        columns = {name: self._tensor(name, arrays[name]) for name in names if name in wanted}
        columns |= {name: self._previous(name) for name in names if name in PREVIOUS_TOKENS}
        if source is not None:
            columns["tv"] = _tv([torch.from_numpy(arrays[name]) for name in source])
        return Summary({name: columns[name] for name in names})

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        absent = [name for name in names if name not in self.summary_fields]
        if absent:
            remedy = "collect with --hidden" if set(absent) & HIDDEN_FIELDS else "leave it out"
            have = ", ".join(self.summary_fields)
            raise InputError(f"the traces hold no summary field {absent[0]!r} ({remedy}); they hold {have}")

    def _tensor(self, name: str, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor.view(len(self), width(self._kind(name))) if name in HIDDEN_FIELDS else tensor

    def _previous(self, name: str) -> torch.Tensor:
        prompt, position, token = (self.column(column) for column in ("prompt", "position", "token"))
        back = PREVIOUS_TOKENS.index(name) + 1
        return torch.from_numpy(previous_tokens(prompt, position, token, back))

    def _tv_source(self, temperature: float | None) -> tuple[str, ...]:
        if temperature is None or temperature == self.manifest.temperature:
            return ("tv",)
        if temperature == 1:
            return ("tv_unscaled",)
        if temperature == 0:
            return ("drafter_argmax", "verifier_argmax")
        raise InputError(
            f"temperature={temperature}: these traces hold D_TV for {self.manifest.temperature}, 1 and 0; "
            f"collect again with --temperature {temperature}"
        )

    @cached_property
    def _prompt_numbers(self) -> np.ndarray:
        return self.column("prompt") if len(self._shards) else np.empty(0, dtype=np.int32)

    @property
    def prompt_of_row(self) -> np.ndarray:
        """Each row's index into ``manifest.prompt_ids``, int32 [N]: the clusters of a bootstrap."""
        return self._prompt_numbers

    @cached_property
    def prompt_ids(self) -> tuple[str, ...]:
        """Ids of the prompts of these traces, in manifest order."""
        ids = self.manifest.prompt_ids
        if self._prompts is not None:
            return tuple(ids[number] for number in sorted(self._prompts))
        if self.complete:
            return tuple(ids)
        present = {self.manifest.chunks[shard.record.id] for shard in self._shards}
        return tuple(ids[n] for n in sorted(number for chunk in present for number in chunk.prompts))

    @cached_property
    def prompt_hashes(self) -> dict[str, str]:
        """Hash of the text of each of `prompt_ids`, by id; empty for traces that were collected without."""
        recorded = dict(zip(self.manifest.prompt_ids, self.manifest.prompt_hashes))
        return {name: recorded[name] for name in self.prompt_ids if name in recorded}

    def select_prompts(self, ids: Iterable[str]) -> Traces:
        """The rows of some prompts, without copying anything yet.

        Raises:
            InputError: an id that is not among these traces' prompts.
        """
        place = {name: number for number, name in enumerate(self.manifest.prompt_ids)}
        wanted = list(dict.fromkeys(ids))
        strangers = set(wanted) - set(self.prompt_ids)
        if strangers:
            raise InputError(
                f"prompt id {sorted(strangers)[0]!r} is not among the {len(self.prompt_ids)} of these traces"
            )
        numbers = frozenset(place[name] for name in wanted)
        keep = np.zeros(len(place), dtype=bool)
        keep[sorted(numbers)] = True
        shards, rows = [], []
        for number, shard in enumerate(self._shards):
            before = self._rows[number]
            chosen = np.flatnonzero(keep[self._part(number, "prompt", 1)])
            if len(chosen):
                shards.append(shard)
                rows.append(chosen if before is None else before[chosen])
        return Traces(self.manifest, shards, self.complete, rows, numbers)


def _empty(count: int, kind: np.dtype) -> np.ndarray:
    """Torch's memory: NumPy asks for huge pages, which the kernel may spend seconds on assembling."""
    return torch.empty(count, dtype=torch.from_numpy(np.empty(0, dtype=kind)).dtype).numpy()


def _tv(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else (values[0] != values[1]).float()


def open_traces(folder: str | Path, *, verify: bool = False, partial: bool = False) -> Traces:
    """Open a trace folder (local, or an fsspec address).

    Args:
        folder: what ``collect`` wrote.
        verify: also check every byte of every shard (SHA-256); without it, sizes are checked now and the
            values of a column when it is first read.
        partial: accept a folder whose collection has not finished.

    Raises:
        InputError: not a trace folder, an unfinished one, a schema version that this release does not read,
            or a missing, cut or altered shard, named.
    """
    place = open_folder(folder)
    manifest = read_header(place)
    records, stopped = read_ledger(place)
    missing = [chunk for chunk in manifest.chunks if chunk.id not in records]
    if missing and not (partial or stopped):
        raise InputError(
            f"{place}: {len(missing)} of {len(manifest.chunks)} shards are not there yet, "
            f"first {missing[0].file}; run collect again with the same settings to finish"
        )
    strangers = sorted(set(records) - {chunk.id for chunk in manifest.chunks})
    if strangers:
        raise InputError(
            f"{place}: the ledger lists shard {strangers[0]}, which the manifest does not plan; "
            "run collect again with the same settings to repair it"
        )
    shards = [Shard(place, records[number], manifest) for number in sorted(records)]
    for shard in shards:
        shard.check_size()
    if verify:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(Shard.check_whole, shards))
    return Traces(manifest, shards, complete=not missing)
