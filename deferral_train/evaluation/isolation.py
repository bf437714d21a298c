"""Starts a process for what a model wrote: limits that the system enforces, no environment, and where the system allows
it no network, no other process and no file that could be changed. Isolation, not a sandbox: one kernel serves both.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENTRY = Path(__file__).with_name("isolation_worker.py")
NOBODY = 65534


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of one process; a system that lacks one leaves it out.

    Attributes:
        memory: bytes of address space.
        file_bytes: of one written file; 0 lets nothing be written.
        cpu_seconds: of computing, None for no end.
        alone: no further process or thread may be started.
    """

    memory: int = 512 << 20
    file_bytes: int = 0
    cpu_seconds: int | None = None
    alone: bool = False


def start(
    script: Path, arguments: Sequence[str], limits: ProcessLimits, *, folder: str | None = None
) -> subprocess.Popen[bytes]:
    """Start a Python script in a process group of its own, with pipes for standard input and output.

    Args:
        script: needs nothing but Python. ``-I``: nothing from the environment or the working directory is imported.
        arguments: of the script.
        folder: a folder for the process alone; given, it also gets namespaces of its own where the system allows
            them (:func:`own_folder` makes one). None starts it in the root folder, with the limits alone.
    """
    settings = {**asdict(limits), "folder": folder, "nobody": nobody()}
    return subprocess.Popen(
        [sys.executable, "-I", str(ENTRY), json.dumps(settings), str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder or os.path.abspath(os.sep),
        env=_no_environment(),
        start_new_session=True,
    )


def end(process: subprocess.Popen[Any]) -> None:
    """Kill the process and whatever else is in its group, and wait for it."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not written yet has no reader any more
                pipe.close()
    process.wait()


@contextlib.contextmanager
def own_folder() -> Any:
    """A temporary folder that the isolated process may write to, removed with all that it holds."""
    with tempfile.TemporaryDirectory(prefix="deferral-", ignore_cleanup_errors=True) as folder:
        if (user := nobody()) is not None:
            os.chown(folder, user, -1)
        yield folder


def nobody() -> int | None:
    """The user that a process of root's becomes, so that limits hold for it; None for every other user."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    import pwd

    try:
        return pwd.getpwnam("nobody").pw_uid
    except KeyError:
        return NOBODY


def _no_environment() -> dict[str, str]:
    """Nothing, but for what Windows needs to start a process at all."""
    return {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ and os.name == "nt"}
