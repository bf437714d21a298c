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
from deferral_train.provenance import append_text, read_json, refuse_reuse, write_json, write_text
from deferral_train.redaction import redacted

OUTPUTS, BATCHES, RUN = "outputs.jsonl", "batches.jsonl", "run.json"
SUMMARY, METRICS = "summary.json", "metrics.jsonl"
AGAIN = "decode again with --fresh"
Key = tuple[str, int, int]  # rule, repetition, batch


class OutputFolder:
    """Append-only outputs of one run, resumable after any interruption.

    Args:
        folder: made if absent.
        identity: everything that decides what is written; kept in ``run.json``.
        fresh: remove the outputs of another run rather than refuse.

    Raises:
        InputError: the folder holds finished batches of another run.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = Path(folder)
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
                read_json(path, AGAIN),
                identity,
                "use another folder, or --fresh to start over",
            )
            return
        (self.folder / SUMMARY).unlink(missing_ok=True)
        write_json(path, redacted(identity))

    def _recover(self) -> None:
        """Keep what is whole: rows of finished batches."""
        for line in read_lines(self.folder / BATCHES):
            self.finished[_key(line)] = line
        rows = [row for row in read_lines(self.folder / OUTPUTS) if _key(row) in self.finished]
        counts: dict[Key, int] = {}
        for row in rows:
            counts[_key(row)] = counts.get(_key(row), 0) + 1
        self.finished = {k: v for k, v in self.finished.items() if counts.get(k) == v.get("rows")}
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
            f"outputs: a line names no rule, repetition and batch ({str(dict(line))[:80]}); {AGAIN}"
        )
    return rule, repetition, batch


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, text: str) -> None:
    # Not waited for: a batch whose rows went with the machine's power is found by its count and decoded again.
    append_text(path, text, durable=False)
