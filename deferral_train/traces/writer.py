"""Write trace folders: a header, then shards that are whole or absent, then one ledger line per shard."""

from __future__ import annotations

import contextlib
import errno
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from deferral_train.errors import InputError
from deferral_train.traces.folder import Folder, Sink, open_folder
from deferral_train.traces.ledger import (
    ChunkRecord,
    ledger_files,
    ledger_name,
    read_ledger,
    stop_line,
    write_ledger,
)
from deferral_train.traces.manifest import HEADER, Chunk, Manifest, differences, read_header, write_header
from deferral_train.traces.schema import flat_values

NONFINITE_SHOWN = 20  # places named per shard; all are counted


class TraceWriter:
    """Adds shards to a prepared folder; one writer per process.

    Args:
        folder: trace folder, prepared by :func:`prepare_folder`.
        manifest: its header.
        rank: number of this process; each writes a ledger file of its own.
    """

    def __init__(self, folder: str | Folder, manifest: Manifest, rank: int = 0) -> None:
        self.folder = folder if isinstance(folder, Folder) else open_folder(folder)
        self.manifest, self.rank = manifest, rank
        self.layout = manifest.layout

    def write(
        self,
        chunk: Chunk,
        columns: Mapping[str, np.ndarray],
        nonfinite: Sequence[tuple[int, int, str]] = (),
    ) -> ChunkRecord:
        """Write the chunk's shard (tmp, fsync, rename), then its ledger line.

        Args:
            chunk: from the manifest.
            columns: one array per column of the layout, rows ordered by (prompt, position).
            nonfinite: places left out, as (prompt number, position, model).

        Raises:
            InputError: columns that do not fit, or a full disk.
        """
        batch = self.layout.batch(columns)
        with _full_disk(self.folder, chunk.file):
            record = write_shard(self.folder, chunk, batch, nonfinite)
            self.folder.append_line(ledger_name(self.rank), record.line())
        return record

    def stop(self, reason: str) -> None:
        """Record that collecting ended early on purpose."""
        self.folder.append_line(ledger_name(self.rank), stop_line(reason))


@contextlib.contextmanager
def _full_disk(folder: Folder, file: str) -> Iterator[None]:
    """A disk that fills up while writing is one line that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{folder}: the disk is full at {file}; finished shards are safe: "
            "free space and run the same command again"
        ) from error


def write_shard(
    folder: Folder, chunk: Chunk, batch: pa.RecordBatch, nonfinite: Sequence[tuple[int, int, str]] = ()
) -> ChunkRecord:
    """One record batch as one Arrow IPC stream; the checksum is taken on the way out."""

    def fill(sink: Sink) -> None:
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), batch.schema) as stream:
            stream.write_batch(batch)

    sink = folder.write_with(chunk.file, fill)
    sums = {name: checksum(batch.column(name)) for name in batch.schema.names}
    shown = tuple(
        (int(prompt), int(position), model) for prompt, position, model in nonfinite[:NONFINITE_SHOWN]
    )
    return ChunkRecord(
        chunk.id, chunk.file, batch.num_rows, sink.size, sink.sha256, sums, len(nonfinite), shown
    )


def checksum(array: pa.Array) -> int:
    """CRC-32 of a column's values."""
    return zlib.crc32(flat_values(array).data.cast("B")) if len(array) else 0


def prepare_folder(address: str | Folder, manifest: Manifest) -> list[Chunk]:
    """Make a folder ready for this manifest and say which chunks are still to do.

    A new folder gets its header. A folder that has one is resumed: every recorded shard is checked in full,
    those that are missing, cut or altered go back to the work list, the others are never touched.

    Raises:
        InputError: the folder was collected with something else; names what changed.
    """
    folder = address if isinstance(address, Folder) else open_folder(address)
    folder.make()
    if folder.size(HEADER) is None:
        if ledger_files(folder):
            raise InputError(f"{folder} has shards but no {HEADER}; choose another folder, or empty this one")
        with _full_disk(folder, HEADER):
            write_header(folder, manifest)
    refuse_changes(folder, manifest)
    planned = {chunk.id for chunk in manifest.chunks}
    finished = {number: record for number, record in sound_records(folder).items() if number in planned}
    write_ledger(folder, finished.values())
    for name in folder.names():
        if name.startswith(".") and name.endswith(".tmp"):
            folder.remove(name)
    return [chunk for chunk in manifest.chunks if chunk.id not in finished]


def refuse_changes(folder: Folder, manifest: Manifest) -> None:
    """Raises InputError where the folder was collected with other settings; a new folder is fine."""
    if folder.size(HEADER) is None:
        return
    changed = differences(read_header(folder), manifest)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise InputError(
            f"{folder} was collected with other settings: {'; '.join(changed[:3])}{more}; "
            "use the same ones to resume, another --out, or --fresh to start over"
        )


def clear_folder(folder: Folder) -> None:
    """Remove header, ledgers and shards of a trace folder, the header last; other files stay."""
    shards = [name for name in folder.names() if name.startswith("shard-") and name.endswith(".arrow")]
    for name in [*shards, *ledger_files(folder), HEADER]:
        folder.remove(name)


def sound_records(folder: Folder) -> dict[int, ChunkRecord]:
    """The finished shards whose file is there, complete and unaltered."""
    try:
        records, _ = read_ledger(folder)
    except InputError:
        records = _readable_lines(folder)
    return {
        number: record
        for number, record in records.items()
        if folder.size(record.file) == record.bytes and folder.sha256(record.file) == record.sha256
    }


def _readable_lines(folder: Folder) -> dict[int, ChunkRecord]:
    """Records that a damaged ledger still holds; the shards behind unreadable lines are collected again."""
    records = {}
    for name in ledger_files(folder):
        for line in folder.read(name).decode("utf-8", "replace").splitlines():
            try:
                record = ChunkRecord.parse(json.loads(line))
            except (ValueError, TypeError, AttributeError):
                continue
            records[record.id] = record
    return records
