"""Python processes that begin with the heavy packages imported: real processes, started by a fork.

A test that starts ``python`` a dozen times spends most of its time on importing torch, transformers and Lightning. The
programs in ``Warm.folder`` (``python``, ``deferral-train``) take the same arguments and run them in a fork of
``server.py``, which imported other people's packages and none of ours: own working directory, environment, standard
streams, exit status; a signal sent to the program reaches the process, and a killed program's process is killed.
What they do not take: descriptors above 2, a session of their own, variables that are read while Python starts or while
those packages are imported. A test of those starts `sys.executable`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = {
    "python": [],
    "deferral-train": [
        "-c",
        "import sys; sys.argv[0] = 'deferral-train'; from deferral_train.cli import main; sys.exit(main())",
    ],
}


class Warm:
    """A server of forks and the programs that ask it; one a test session, ended by `close`."""

    def __init__(self) -> None:
        self._made = tempfile.TemporaryDirectory(prefix="warm-")
        self.folder = Path(self._made.name)
        address = self.folder / "socket"
        client = (HERE / "client.py").read_text(encoding="utf-8")
        for name, first in PROGRAMS.items():
            program = self.folder / name
            settings = f"ADDRESS, FIRST = {str(address)!r}, {first!r}\n"
            program.write_text(f"#!{sys.executable} -SEs\n{settings}{client}", encoding="utf-8")
            program.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "server.py"), str(address)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n", "the server of warm processes did not start"

    @property
    def python(self) -> str:
        """Stands where `sys.executable` would."""
        return str(self.folder / "python")

    def kill(self, program: subprocess.Popen) -> int:
        """Send SIGKILL to a program's process, wait until it is gone, and return its exit status.

        `Popen.kill` ends the program first and its process a moment later.
        """
        os.kill(int((self.folder / f"socket.{program.pid}").read_text()), signal.SIGKILL)
        return program.wait()

    def close(self) -> None:
        """End the server and what it still runs."""
        self._server.terminate()
        self._server.wait()
        self._made.cleanup()
