"""Python that a model wrote, scored by running it: right where the tests that follow it raise nothing (pass@1).

Programs are trusted with nothing and run only within :func:`code_execution`, each in a process of its own
(:mod:`deferral_train.evaluation.isolation`). That is isolation, not a sandbox: who expects programs written to break
out runs all of this in a virtual machine. A program in one process with its tests can also claim to have passed them;
one that does so for tests that must fail is found and counted.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import selectors
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from deferral_train.errors import InputError
from deferral_train.evaluation import isolation
from deferral_train.evaluation.isolation import ProcessLimits

METRIC = "python_tests"
FLAG = "--allow-code-execution"
RIGHT, FORGED = "right", "forged"
MUST_FAIL = "\nassert False, 'no program passes this'\n"
MOST_ANSWER = 64 << 10  # bytes
WORKER = Path(__file__).with_name("code_worker.py")
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_PROBE = "import collections, functools, heapq, itertools, math, re, string, typing\n"
_allowed: ContextVar[bool] = ContextVar("code_execution_allowed", default=False)


ONE_PROGRAM = ProcessLimits(file_bytes=1 << 20, cpu_seconds=5, alone=True)


@dataclass(frozen=True)
class CodeLimits:
    """Limits of one program.

    Attributes:
        seconds: before its process is killed.
        process: of the process, as the system counts.
    """

    seconds: float = 10.0
    process: ProcessLimits = ONE_PROGRAM


@dataclass(frozen=True)
class ProgramOutcome:
    """The end of one program.

    Attributes:
        verdict: ``right``, ``wrong`` (a test failed), ``error``, ``syntax``, ``time``, ``memory``, ``left early`` (it
            ended its process, or was ended, before the tests were through), or ``forged``.
        detail: what was raised.
        isolated: what was out of its reach: network, processes, files.
    """

    verdict: str
    detail: str = ""
    isolated: tuple[str, ...] = ()


@contextlib.contextmanager
def code_execution(allowed: bool) -> Iterator[None]:
    """Within, programs may be run where ``allowed``; says once what the system keeps out of their reach.

    Raises:
        InputError: not even an honest program runs here.
    """
    if allowed:
        print(_probe(), file=sys.stderr)
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def check_allowed() -> None:
    """Refuse to score code where nobody said that it may run.

    Raises:
        InputError: outside of :func:`code_execution`.
    """
    if not _allowed.get():
        raise InputError(
            f"metric {METRIC} runs programs that a model wrote; say so with {FLAG} (in Python: with "
            "code_execution(True)), best in a virtual machine or container"
        )


def judge_code(texts: Sequence[str], tests: Sequence[str], limits: CodeLimits | None = None) -> list[str]:
    """The verdict on each text's program (:class:`ProgramOutcome`); equal programs run once.

    Raises:
        InputError: as :func:`check_allowed`.
    """
    check_allowed()
    jobs = list(zip(map(program_of, texts), tests, strict=True))
    known = {job: _verdict(*job, limits or CodeLimits()) for job in dict.fromkeys(jobs)}
    return [known[job] for job in jobs]


def program_of(text: str) -> str:
    """The program in an answer: its first block fenced as Python, else its first fenced block, else all of it.

    A block that the end of the answer cut off counts too.
    """
    blocks = [(found[1].lower(), found[2]) for found in _FENCE.finditer(text)]
    python = [block for language, block in blocks if language in ("python", "py", "python3")]
    return textwrap.dedent((python or [block for _, block in blocks] or [text])[0])


def _verdict(code: str, tests: str, limits: CodeLimits) -> str:
    verdict = run_program(code, tests, limits).verdict
    if verdict == RIGHT and run_program(code, tests + MUST_FAIL, limits).verdict == RIGHT:
        return FORGED
    return verdict


def run_program(code: str, tests: str, limits: CodeLimits) -> ProgramOutcome:
    """Run one program and its tests in a process of its own.

    Raises:
        InputError: as :func:`check_allowed`.
    """
    check_allowed()
    return _run(code, tests, limits)


def _run(code: str, tests: str, limits: CodeLimits) -> ProgramOutcome:
    key = secrets.token_hex(16)
    try:
        job = json.dumps({"code": code, "tests": tests, "key": key}).encode() + b"\n"
        code.encode()
    except UnicodeError:
        return ProgramOutcome("syntax", "half a character")
    with isolation.own_folder() as folder:
        process = isolation.start(WORKER, (), limits.process, folder=folder)
        try:
            answer = _exchange(process, job, time.monotonic() + limits.seconds)
        finally:
            isolation.end(process)
    if answer is None:
        return ProgramOutcome("time", f"killed after {limits.seconds:g} s")
    return _outcome(answer, key, process.returncode)


def _exchange(process: subprocess.Popen[bytes], job: bytes, until: float) -> bytes | None:
    """The answer of the process to a job, at most :data:`MOST_ANSWER` bytes; None where it takes too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except OSError:  # it ended before it read all: that there is no answer tells
        pass
    answer = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while len(answer) < MOST_ANSWER and not answer.endswith(b"\n"):
            if not waiting.select(max(0.0, until - time.monotonic())):
                return None
            part = process.stdout.read1(4096)  # type: ignore[attr-defined]
            if not part:
                # Its status tells why it ended; wait for that, not for a kill.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, until - time.monotonic()))
                break
            answer += part
    return answer


def _outcome(answer: bytes, key: str, status: int | None) -> ProgramOutcome:
    try:
        found = json.loads(answer)
        if found["key"] == key:
            return ProgramOutcome(
                str(found["verdict"]), str(found["detail"]), tuple(map(str, found["isolated"]))
            )
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    if status == 128 + getattr(signal, "SIGXCPU", 24):
        return ProgramOutcome("time", "out of computing time")
    return ProgramOutcome("left early", f"its process ended with {status}")


def _probe() -> str:
    """One line on what programs cannot reach here.

    Raises:
        InputError: an honest program does not pass.
    """
    found = _run(_PROBE, "assert math.gcd(12, 18) == 6", CodeLimits())
    if found.verdict != RIGHT:
        raise InputError(
            f"{FLAG}: not even an honest program runs here ({found.verdict}: {found.detail}); use a Python that every "
            f"user of this system may read, not {sys.executable}"
        )
    missing = [name for name in ("network", "processes", "files") if name not in found.isolated]
    if not missing:
        return "code runs without network, alone, and can change no file outside of a temporary folder"
    return (
        f"code runs with limits, but this system does not let it be cut off from: {', '.join(missing)}; run this in a "
        "container or virtual machine without network"
    )
