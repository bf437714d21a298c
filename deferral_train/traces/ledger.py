"""Which shards of a trace folder are finished: one line of ``chunks.jsonl`` for each.

A line is added when its shard is complete on disk; a process beyond the first writes ``chunks.rankN.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deferral_train.errors import InputError
from deferral_train.traces.folder import Folder
from deferral_train.traces.manifest import is_count, require

LEDGER = "chunks.jsonl"


@dataclass(frozen=True)
class ChunkRecord:
    """One finished shard, as its line in the ledger says.

    Attributes:
        id: chunk id.
        file: shard file name.
        rows: token rows in it.
        bytes: file size.
        sha256: of the whole file.
        columns: CRC-32 of each column's values, so that a reader can check just what it reads.
        nonfinite: positions left out because a model gave NaN or infinite logits.
        nonfinite_at: the first few of them as [prompt number, position, model].
    """

    id: int
    file: str
    rows: int
    bytes: int
    sha256: str
    columns: Mapping[str, int]
    nonfinite: int = 0
    nonfinite_at: tuple[tuple[int, int, str], ...] = ()

    def line(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> ChunkRecord:
        places = tuple(tuple(place) for place in value.get("nonfinite_at", ()))
        record = cls(**{**value, "nonfinite_at": places})
        for name in ("id", "rows", "bytes", "nonfinite"):
            require(is_count(getattr(record, name)), f"{name} is no count")
        require(isinstance(record.columns, dict), "columns is no object")
        # A ledger may come from elsewhere: it names no file outside its folder.
        if record.file != f"shard-{record.id:05d}.arrow":
            raise ValueError(f"chunk {record.id} lies in {record.file!r}")
        return record


def ledger_name(rank: int) -> str:
    """Where a process writes its lines."""
    return LEDGER if rank == 0 else f"chunks.rank{rank}.jsonl"


def ledger_files(folder: Folder) -> list[str]:
    names = [name for name in folder.names() if name.startswith("chunks.") and name.endswith(".jsonl")]
    return sorted(names, key=lambda name: (name != LEDGER, name))


def read_ledger(folder: Folder) -> tuple[dict[int, ChunkRecord], str | None]:
    """Finished shards by chunk id, and why collecting was stopped on purpose, if it was.

    A last line cut by a crash counts as not written: its chunk is collected again.
    """
    records: dict[int, ChunkRecord] = {}
    stopped: str | None = None
    for name in ledger_files(folder):
        lines = folder.read(name).decode("utf-8", "replace").split("\n")
        for number, line in enumerate(lines[:-1], 1):
            value = _entry(folder, name, number, line)
            if "stopped" in value:
                stopped = value["stopped"]
            elif value:
                record = ChunkRecord.parse(value)
                records[record.id] = record
    return records, stopped


def _entry(folder: Folder, name: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        require(isinstance(value, dict), "no object")
        if "stopped" in value:
            require(isinstance(value["stopped"], str), "stopped is no text")
        else:
            ChunkRecord.parse(value)
        return value
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder}/{name}, line {number}: damaged; run collect again with the same settings to repair it"
        ) from error


def stop_line(reason: str) -> str:
    """Says that collecting ended early on purpose, so that readers accept the part."""
    return json.dumps({"stopped": reason})


def write_ledger(folder: Folder, records: Iterable[ChunkRecord], stopped: str | None = None) -> None:
    """Replace all ledger files by one with these lines: what a resumed run starts from."""
    lines = [record.line() for record in sorted(records, key=lambda record: record.id)]
    lines += [] if stopped is None else [stop_line(stopped)]
    folder.write(LEDGER, "".join(line + "\n" for line in lines).encode())
    for name in ledger_files(folder):
        if name != LEDGER:
            folder.remove(name)
