"""The files of a decode run: rows as they finish, a line per finished batch, what the run is.

``outputs.jsonl`` holds one line per (rule, repetition, prompt); ``batches.jsonl`` one line per finished
batch, written after the batch's rows. A batch without its line is not finished: its rows are dropped on
resuming.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.provenance import hash_of, write_json, write_text

OUTPUTS, BATCHES, RUN = "outputs.jsonl", "batches.jsonl", "run.json"
Key = tuple[str, int, int]  # rule, repetition, batch


class OutputFolder:
    """Append-only outputs of one run, resumable after any interruption.

    Args:
        folder: made if absent.
        identity: everything that decides what is written; kept in ``run.json``.

    Raises:
        InputError: the folder holds finished batches of another run.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._adopt(dict(identity))
        self.finished: dict[Key, dict[str, Any]] = {}
        self._recover()

    def _adopt(self, identity: dict[str, Any]) -> None:
        path = self.folder / RUN
        if not path.exists() or not any(read_lines(self.folder / BATCHES)):  # refused in its first batch, say
            write_json(path, identity)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        if hash_of(before) != hash_of(json.loads(json.dumps(identity))):
            changed = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
            raise InputError(
                f"out={self.folder} holds a run with other {', '.join(changed) or 'settings'}; "
                "use another folder"
            )

    def _recover(self) -> None:
        """Keep what is whole: rows of finished batches."""
        for line in read_lines(self.folder / BATCHES):
            self.finished[_key(line)] = line
        rows = [row for row in read_lines(self.folder / OUTPUTS) if _key(row) in self.finished]
        counts: dict[Key, int] = {}
        for row in rows:
            counts[_key(row)] = counts.get(_key(row), 0) + 1
        self.finished = {k: v for k, v in self.finished.items() if counts.get(k) == v["rows"]}
        rows = [row for row in rows if _key(row) in self.finished]
        if (self.folder / OUTPUTS).exists():
            write_text(self.folder / OUTPUTS, "".join(_line(row) for row in rows))
            write_text(self.folder / BATCHES, "".join(_line(batch) for batch in self.finished.values()))

    def append(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> None:
        """Put a finished batch on the disk: its rows, then the line that makes them count."""
        _append(self.folder / OUTPUTS, "".join(_line(row) for row in rows))
        _append(self.folder / BATCHES, _line(batch))
        self.finished[_key(batch)] = dict(batch)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row written so far."""
        return read_lines(self.folder / OUTPUTS)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines of a file; a last line cut short by a crash is left out.

    Raises:
        InputError: another line that is no JSON, by number.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is no JSON ({error}); decode again") from None


def _key(line: Mapping[str, Any]) -> Key:
    return line["rule"], line["repetition"], line["batch"]


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, text: str) -> None:
    # No fsync: a batch whose rows went with the machine's power is found by its count and decoded again.
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
