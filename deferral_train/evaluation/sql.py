"""Execution accuracy: a query is right where it answers with the rows of the reference query.

Rows count as a multiset, and in order where the reference orders them; names of columns do not count; floats agree
within 1e-9. A query that cannot be run is wrong, and its reason is counted. Queries are text that a model wrote and
are trusted with nothing: see :mod:`deferral_train.evaluation.sql_worker`.
"""

from __future__ import annotations

import json
import math
import queue
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.evaluation import isolation

PREFIX = "sql:"
WRONG, RIGHT = "wrong rows", "right"
TOLERANCE = 1e-9
KEPT_ROWS = 100
Row = Sequence[Any]
_ORDER = re.compile(r"\border\s+by\b", re.IGNORECASE)
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")


@dataclass(frozen=True)
class Limits:
    """Limits of one query.

    Attributes:
        seconds: before the process is killed. steps: instructions of SQLite's machine, the same on every machine.
        memory: bytes of the process. rows, bytes: of one answer.
    """

    seconds: float = 10.0
    steps: int = 20_000_000
    memory: int = 512 << 20
    rows: int = 1000
    bytes: int = 1 << 20


@dataclass(frozen=True)
class Answer:
    """Rows of a query, or None and the ``reason`` why there are none."""

    rows: list[list[Any]] | None
    reason: str = ""
    detail: str = ""


class SqlRunner:
    """Runs untrusted queries on one database, read-only, in a process of its own; a context manager.

    Args:
        database: a SQLite file.
        limits: of every query.

    Raises:
        InputError: no such file, or a file that is no SQLite database.
    """

    def __init__(self, database: str | Path, limits: Limits | None = None) -> None:
        check_database(database)
        # as_uri escapes ?, # and %, which would otherwise end the path or switch read-only off.
        self.uri = f"{Path(database).resolve().as_uri()}?mode=ro"
        self.limits = limits or Limits()
        state = Path(database).stat()
        self._known = _known_answers(self.uri, state.st_mtime_ns, state.st_size, self.limits)
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def __enter__(self) -> SqlRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, query: str) -> Answer:
        """The answer of one query. Short answers are kept: many settings write the same queries."""
        if query in self._known:
            return self._known[query]
        answer = self._run(query)
        if answer.reason != "memory" and len(answer.rows or ()) <= KEPT_ROWS:
            self._known[query] = answer
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            isolation.end(self._process)
            self._process = None

    def _run(self, query: str) -> Answer:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(query).encode() + b"\n")
            process.stdin.flush()
            line = self._lines.get(timeout=self.limits.seconds)
        except queue.Empty:
            self.close()
            return Answer(None, "time", f"killed after {self.limits.seconds:g} s")
        except OSError:
            line = b""
        if not line:  # it ended by itself: the system refused it memory, or SQLite failed
            self.close()
            return Answer(None, "memory", "the process that ran it ended")
        found = json.loads(line)
        if "error" in found:
            return Answer(None, found["error"], found["detail"])
        return Answer(found["rows"])

    def _start(self) -> subprocess.Popen[bytes]:
        worker = Path(__file__).with_name("sql_worker.py")
        arguments = (self.uri, json.dumps(asdict(self.limits)))
        self._process = isolation.start(worker, arguments, isolation.ProcessLimits(self.limits.memory))
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._process


@lru_cache(maxsize=4)
def _known_answers(uri: str, changed: int, size: int, limits: Limits) -> dict[str, Answer]:
    """Answers of this process so far, by query, for one state of a database."""
    return {}


def _pass_on(lines: Iterable[bytes], into: queue.SimpleQueue[bytes]) -> None:
    """Lines as they come, and an empty one at their end."""
    for line in lines:
        into.put(line)
    into.put(b"")


def check_database(database: str | Path) -> None:
    """Refuse what is no SQLite database.

    Raises:
        InputError: naming the file.
    """
    path = Path(database)
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(
            f"metric {PREFIX}{database}: the database cannot be read ({error.strerror}); give sql:FILE with a "
            "SQLite file"
        ) from None
    if start != b"SQLite format 3\0":
        raise InputError(
            f"metric {PREFIX}{database}: not a SQLite database; give sql:FILE with a SQLite file"
        )


def judge(
    database: str | Path, texts: Sequence[str], references: Sequence[str], limits: Limits | None = None
) -> list[str]:
    """For each text ``right``, ``wrong rows``, or the reason why it could not be run.

    Raises:
        InputError: a reference that cannot be run itself, or no database.
    """
    with SqlRunner(database, limits) as runner:
        return [_verdict(runner, text, reference) for text, reference in zip(texts, references, strict=True)]


def reasons(verdicts: Iterable[str]) -> dict[str, int]:
    """How many texts were wrong for each reason, most frequent first."""
    return dict(Counter(verdict for verdict in verdicts if verdict != RIGHT).most_common())


def _verdict(runner: SqlRunner, text: str, reference: str) -> str:
    gold = runner.run(reference)
    if gold.rows is None:
        raise InputError(
            f"reference {reference[:100]!r} cannot be run on the database ({gold.reason}: {gold.detail}); mend it"
        )
    answer = runner.run(text)
    if answer.rows is None:
        return answer.reason
    return RIGHT if same_rows(answer.rows, gold.rows, ordered=is_ordered(reference)) else WRONG


def is_ordered(query: str) -> bool:
    """True where a query orders its rows; an order inside parentheses or quotes is none of its own."""
    text = _QUOTED.sub(" ", query)
    depth, outside = 0, []
    for character in text:
        depth += (character == "(") - (character == ")")
        outside.append(character if depth == 0 else " ")
    return _ORDER.search("".join(outside)) is not None


def same_rows(rows: Sequence[Row], gold: Sequence[Row], *, ordered: bool) -> bool:
    """True where two answers hold the same rows, as multisets or in order."""
    if len(rows) != len(gold):
        return False
    if ordered:
        return all(map(_same_row, rows, gold))
    ours, theirs = (Counter(map(tuple, part)) for part in (rows, gold))
    if ours == theirs:
        return True
    if not any(isinstance(value, float) for part in (rows, gold) for row in part for value in row):
        return False
    left = list((theirs - ours).elements())
    for row in (ours - theirs).elements():
        match = next((place for place, other in enumerate(left) if _same_row(row, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_row(row: Row, gold: Row) -> bool:
    return len(row) == len(gold) and all(map(_same_value, row, gold))


def _same_value(value: Any, gold: Any) -> bool:
    if isinstance(value, float) or isinstance(gold, float):
        numbers = isinstance(value, int | float) and isinstance(gold, int | float)
        return numbers and math.isclose(value, gold, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return type(value) is type(gold) and value == gold


def database_of(metric: str) -> str | None:
    """The file of ``sql:FILE``; None for another metric."""
    return metric.removeprefix(PREFIX) if metric.startswith(PREFIX) else None
