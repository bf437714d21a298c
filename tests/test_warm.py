"""Warm processes do what Python's own do: streams, folder, environment, exit status, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

CODE = (
    "import os, sys; print(os.getcwd(), os.environ.get('COLOUR'), sys.argv, sys.path[:2], sys.stdin.read());"
    "print('spoken', file=sys.stderr); sys.exit(int(sys.argv[1]))"
)


@pytest.mark.parametrize("words", [["-c", CODE, "3"], ["code.py", "0"], ["-m", "code", "256"]])
def test_a_warm_process_does_what_a_cold_one_does(warm, tmp_path, words):
    (tmp_path / "code.py").write_text(CODE)
    environment = {**os.environ, "COLOUR": "blue", "PYTHONPATH": "somewhere"}
    cold, quick = (
        subprocess.run(
            [python, *words], cwd=tmp_path, env=environment, input="asked", capture_output=True, text=True
        )
        for python in (sys.executable, warm.python)
    )
    assert (quick.returncode, quick.stdout, quick.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert quick.stderr == "spoken\n"


@pytest.mark.parametrize(
    "code", ["raise ValueError('so')", "raise SystemExit('so')", "import os; os.kill(os.getpid(), 9)"]
)
def test_the_end_is_passed_on(warm, code):
    cold, quick = (
        subprocess.run([python, "-c", code], capture_output=True, text=True)
        for python in (sys.executable, warm.python)
    )
    assert quick.returncode == cold.returncode
    assert quick.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    "end", [lambda p, _: p.kill(), lambda p, _: p.terminate(), lambda p, warm: warm.kill(p)]
)
def test_signals_reach_the_process(warm, end):
    process = subprocess.Popen([warm.python, "-c", SLEEP], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    end(process, warm)
    assert process.wait() in (-signal.SIGKILL, -signal.SIGTERM)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")
