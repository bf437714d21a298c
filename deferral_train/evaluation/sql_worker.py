"""The process in which untrusted queries run: a line of JSON in, a line of JSON out. Needs nothing but Python.

It reads one database and may do nothing else: an authorizer allows SELECT, reading columns and the functions below,
the file is opened read-only, and lengths, memory, rows and steps are limited. What these cannot stop (a single long
instruction) the process outside ends by killing this one.

It is started by isolation_worker.py with the arguments URI LIMITS: the database as ``file:///path?mode=ro``, and the
limits as JSON.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any

FUNCTIONS = frozenset(
    {
        *(
            "abs",
            "avg",
            "cast",
            "coalesce",
            "count",
            "group_concat",
            "ifnull",
            "iif",
            "instr",
            "length",
            "like",
        ),
        *("lower", "ltrim", "max", "min", "nullif", "round", "rtrim", "substr", "substring", "sum", "total"),
        *("trim", "typeof", "upper"),
    }
)
STEP = 1000  # instructions between two looks at how many there were
ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
LENGTHS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,  # bytes of a value
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 10,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 10,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
}


class Worker:
    """One database and its limits: ``memory`` and ``bytes`` of an answer, ``rows``, ``steps``."""

    def __init__(self, uri: str, limits: dict[str, int]) -> None:
        self.limits, self.steps = limits, 0
        self.connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        self.connection.text_factory = lambda text: text.decode("utf-8", "replace")
        # What a query sorts stays in memory, where it is limited, and in no file.
        self.connection.execute("PRAGMA temp_store = MEMORY")
        self.connection.execute(f"PRAGMA hard_heap_limit = {limits['memory'] // 2}")
        for category, length in LENGTHS.items():
            self.connection.setlimit(category, length)
        self.connection.set_authorizer(_authorize)
        self.connection.set_progress_handler(self._step, STEP)

    def _step(self) -> int:
        self.steps += STEP
        return int(self.steps > self.limits["steps"])

    def answer(self, query: str) -> dict[str, Any]:
        """``rows``, or ``error``: a reason, and ``detail``, what SQLite said."""
        self.steps = 0
        try:
            cursor = self.connection.execute(query)
            if cursor.description is None:
                return _error("no query", "")
            rows, size = [], 0
            for row in cursor:
                rows.append([_plain(value) for value in row])
                size += sum(len(value) if isinstance(value, str) else 8 for value in rows[-1])
                if len(rows) > self.limits["rows"] or size > self.limits["bytes"]:
                    return _error("too many rows", f"more than {self.limits['rows']} rows or too many bytes")
        except MemoryError:
            return _error("memory", "out of memory")
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, UnicodeError) as error:
            return _error(_reason(str(error)), str(error))
        return {"rows": rows}


def _authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
    if action in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _error(reason: str, detail: str) -> dict[str, Any]:
    return {"error": reason, "detail": detail[:200]}


def _reason(said: str) -> str:
    known = {
        "interrupted": "time",
        "out of memory": "memory",
        "too big": "too long",
        "too long": "too long",
        "too large": "too long",
        "not authorized": "not allowed",
        "prohibited": "not allowed",
        "readonly": "not allowed",
        "syntax error": "syntax",
        "incomplete input": "syntax",
        "unrecognized token": "syntax",
        "no such": "no such name",
        "ambiguous": "no such name",
        "one statement": "several queries",
    }
    return next((reason for part, reason in known.items() if part in said.lower()), "other error")


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _queries() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield json.loads(line)


def main() -> None:
    uri, limits = sys.argv[1], json.loads(sys.argv[2])
    worker = Worker(uri, limits)
    for query in _queries():
        sys.stdout.write(json.dumps(worker.answer(query)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
