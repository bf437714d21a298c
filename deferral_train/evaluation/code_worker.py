"""The process in which one program that a model wrote runs, followed by its tests. Needs nothing but Python.

A line of JSON comes in: ``code``, ``tests`` and ``key``. A line goes out once the tests are through: ``key``,
``verdict`` and ``detail``. What the program prints goes nowhere. It is started by isolation_worker.py.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

RIGHT = "right"
NAME = "answer"  # no "__main__": what stands below that guard is not asked for
ISOLATED: list[str] = globals().get("ISOLATED", [])


def run(code: str, tests: str) -> tuple[str, str]:
    """The verdict and what was raised."""
    space: dict[str, Any] = {"__name__": NAME}
    try:
        compiled = compile(code, "<answer>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "syntax", _told(error)
    try:
        exec(compiled, space)
        exec(compile(tests, "<tests>", "exec"), space)
    except AssertionError as error:
        return "wrong", _told(error)
    except MemoryError as error:
        return "memory", _told(error)
    except SystemExit as error:
        return "left early", _told(error)
    except BaseException as error:  # what a program raises is its own
        return "error", _told(error)
    return RIGHT, ""


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:  # its own __str__ may raise
        return "an error that cannot be shown"


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    verdict, detail = run(job["code"], job["tests"])
    line = {"key": job["key"], "verdict": verdict, "detail": detail, "isolated": ISOLATED}
    os.write(answer, json.dumps(line).encode() + b"\n")
    os._exit(0)  # what the program left to run at exit does not run


if __name__ == "__main__":
    main()
