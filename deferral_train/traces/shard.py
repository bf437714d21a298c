"""One shard of a trace folder, memory mapped, with every check between its bytes and an array."""

from __future__ import annotations

import zlib
from functools import cached_property

import numpy as np
import pyarrow as pa

from deferral_train.errors import InputError
from deferral_train.traces.folder import Folder
from deferral_train.traces.ledger import ChunkRecord
from deferral_train.traces.manifest import Manifest
from deferral_train.traces.schema import flat_values


class Shard:
    """One shard, opened when first read."""

    def __init__(self, folder: Folder, record: ChunkRecord, manifest: Manifest) -> None:
        self.folder, self.record, self.manifest = folder, record, manifest
        self._checked: set[str] = set()

    @cached_property
    def batch(self) -> pa.RecordBatch:
        """The shard's one record batch, zero-copy over the mapped file."""
        try:
            batch = pa.ipc.open_stream(self.folder.buffer(self.record.file)).read_next_batch()
            if not batch.schema.equals(self.manifest.layout.arrow):
                raise self.damaged("its columns are not those that the manifest describes")
            batch.validate()
        except (pa.ArrowException, StopIteration, OSError, MemoryError, UnicodeDecodeError) as error:
            raise self.damaged("cannot be read as Arrow") from error
        if batch.num_rows != self.record.rows:
            raise self.damaged(f"{batch.num_rows} rows instead of {self.record.rows}")
        return batch

    def values(self, name: str) -> np.ndarray:
        """A column's values, flat, checked on first use."""
        try:
            flat = flat_values(self.batch.column(name))
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise self.damaged(f"column {name} cannot be read") from error
        if name not in self._checked:
            if len(flat) and zlib.crc32(flat.data.cast("B")) != self.record.columns.get(name):
                raise self.damaged(f"column {name} was altered")
            if name == "prompt" and len(flat) and not 0 <= flat.min() <= flat.max() < self._prompts:
                raise self.damaged("a row belongs to a prompt that the manifest does not list")
            self._checked.add(name)
        return flat

    @property
    def _prompts(self) -> int:
        return len(self.manifest.prompt_ids)

    def damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.folder}/{self.record.file}: {what}; run collect again with the same settings to repair it"
        )

    def check_size(self) -> None:
        """Raises InputError where the file is absent, of another size, or too small for the rows it claims."""
        size = self.folder.size(self.record.file)
        if size is None:
            raise self.damaged("the shard is missing")
        if size != self.record.bytes:
            raise self.damaged(f"{size} bytes instead of {self.record.bytes}, the shard was cut or altered")
        if self.record.rows * self.manifest.layout.row_bytes > size:
            raise self.damaged(f"{size} bytes cannot hold {self.record.rows} rows")

    def check_whole(self) -> None:
        """Raises InputError where any byte differs."""
        if self.folder.sha256(self.record.file) != self.record.sha256:
            raise self.damaged("its bytes were altered")
