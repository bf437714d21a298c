"""The files of a decode run: rows as they finish, a line per finished batch, what the run is.

``outputs.jsonl`` holds one line per (rule, repetition, prompt); ``batches.jsonl`` one line per finished
batch, written after the batch's rows. A batch without its line is not finished: its rows are dropped on
resuming.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.provenance import (
    append_text,
    hash_of,
    read_object,
    record_of,
    refuse_reuse,
    write_json,
    write_text,
)

OUTPUTS, BATCHES, RUN = "outputs.jsonl", "batches.jsonl", "run.json"
SUMMARY, METRICS = "summary.json", "metrics.jsonl"
Key = tuple[str, int, int]  # rule, repetition, batch


class OutputFolder:
    """Append-only outputs of one run, resumable after any interruption.

    Attributes:
        identity: hash of the record in ``run.json``.

    Args:
        folder: made if absent.
        identity: everything that decides what is written; kept in ``run.json``.
        fresh: remove the outputs of another run rather than refuse.

    Raises:
        InputError: the folder holds finished batches of another run.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder, self.identity = Path(folder), identity_of(identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in (SUMMARY, METRICS, BATCHES, OUTPUTS, RUN):
                (self.folder / name).unlink(missing_ok=True)
        self._adopt(dict(identity))
        self.finished: dict[Key, dict[str, Any]] = {}
        self._recover()

    def _adopt(self, identity: dict[str, Any]) -> None:
        path = self.folder / RUN
        if any(read_lines(self.folder / BATCHES)):  # none where it was refused in its first batch, say
            refuse_reuse(
                f"out={self.folder}",
                read_record(path),
                identity,
                "use another folder, or --fresh to start over",
            )
            return
        (self.folder / SUMMARY).unlink(missing_ok=True)
        write_json(path, record_of(identity))

    def _recover(self) -> None:
        """Keep what is whole: rows of finished batches, as they were written."""
        batches = {_key(line): line for line in read_lines(self.folder / BATCHES)}
        rows = [row for row in read_lines(self.folder / OUTPUTS) if _key(row) in batches]
        own = rows_by_batch(rows)
        self.finished = {key: line for key, line in batches.items() if is_whole(line, own.get(key, []))}
        rows = [row for row in rows if _key(row) in self.finished]
        if (self.folder / OUTPUTS).exists():
            write_text(self.folder / OUTPUTS, "".join(_line(row) for row in rows))
            write_text(self.folder / BATCHES, "".join(_line(batch) for batch in self.finished.values()))

    def append(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> None:
        """Put a finished batch on the disk: its rows, then the line that makes them count."""
        line = dict(batch) | {"content": _content(batch, rows)}
        _append(self.folder / OUTPUTS, "".join(_line(row) for row in rows))
        _append(self.folder / BATCHES, _line(line))
        self.finished[_key(line)] = line

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row written so far."""
        return read_lines(self.folder / OUTPUTS)


def identity_of(record: Mapping[str, Any]) -> str:
    """Hash of what decided a run's outputs, as ``run.json`` holds it: a summary names the run that it is of."""
    return hash_of(record_of(record))


def rows_by_batch(rows: Iterable[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """Rows by the batch that they name, in order."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row)
    return found


def is_whole(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """True where ``rows`` are those that the line of their batch was written for, none missing, double or altered.

    Lines of earlier releases hold no hash of them: there their number must do.
    """
    same = batch.get("content") in (None, _content(batch, rows))
    return len(rows) == batch.get("rows") and same


def _content(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash of a batch's line, less the hash itself, and of its rows."""
    own = {name: value for name, value in batch.items() if name != "content"}
    return hash_of([_line(own), *(_line(row) for row in rows)])


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object of a decode folder's file; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    return read_object(path, "decode again with --fresh")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines of a file, none where it is absent; a last line cut short by a crash is left out.

    Raises:
        InputError: another line that is no JSON, by number.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace() or not line.endswith(b"\n"):
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number} is no JSON ({error}); decode again") from None
            if not isinstance(found, dict):
                raise InputError(f"{path}, line {number} is no JSON object; decode again")
            yield found


def _key(line: Mapping[str, Any]) -> Key:
    rule, repetition, batch = (line.get(name) for name in ("rule", "repetition", "batch"))
    if not isinstance(rule, str) or not isinstance(repetition, int) or not isinstance(batch, int):
        raise InputError(
            f"outputs: a line names no rule, repetition and batch ({str(dict(line))[:80]}); decode again with --fresh"
        )
    return rule, repetition, batch


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, text: str) -> None:
    # Not waited for: a batch whose rows went with the machine's power is found by its count and decoded again.
    append_text(path, text, durable=False)
