"""Programs that a model wrote: which are right, and that none gets away with anything."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from deferral_train.errors import InputError
from deferral_train.evaluation import code, isolation
from deferral_train.evaluation.code import CodeLimits, code_execution, judge_code, program_of, run_program
from deferral_train.evaluation.isolation import ProcessLimits
from deferral_train.evaluation.quality import check_metric, per_prompt

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(0, 0) == 0\n"
QUICK = CodeLimits(seconds=6.0, process=ProcessLimits(128 << 20, 1 << 20, 1, True))
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are limited on POSIX systems")


@pytest.fixture(autouse=True)
def _allowed(request, monkeypatch):
    if "refused" in request.node.name:
        yield
        return
    with code_execution(True):
        yield


@pytest.fixture
def cut_off() -> None:
    """Skips where the system gives nobody namespaces of its own."""
    found = run_program("", "", QUICK)
    if set(found.isolated) != {"network", "processes", "files"}:
        pytest.skip(f"this system cuts programs off from {found.isolated} alone")


@pytest.mark.parametrize(
    ("text", "tests", "verdict"),
    [
        (ADD, TESTS, "right"),
        (f"Here it is:\n```python\n{ADD}```\nand a test:\n```python\nassert False\n```", TESTS, "right"),
        (f"```\n{ADD}```", TESTS, "right"),
        ("```sh\nls\n```\n```py\n" + ADD + "```", TESTS, "right"),
        (ADD + "if __name__ == '__main__':\n    input()\n", TESTS, "right"),
        (ADD + "print('a' * 10**7)\n", TESTS, "right"),
        ("def add(a, b):\n    return a - b\n", TESTS, "wrong"),
        ("def plus(a, b):\n    return a + b\n", TESTS, "error"),
        ("def add(a, b)\n    return", TESTS, "syntax"),
        ("the answer is 3", TESTS, "syntax"),
        ("x = 1\0", TESTS, "syntax"),
        ("x = '\ud800'", TESTS, "syntax"),
        ("", "assert 1 + 1 == 2", "right"),
    ],
)
def test_verdicts(text: str, tests: str, verdict: str) -> None:
    assert judge_code([text], [tests], QUICK) == [verdict]


def test_the_metric_scores_texts_and_counts_reasons() -> None:
    wrong = ADD.replace("+", "-")
    assert list(per_prompt("python_tests", [ADD, wrong, ADD], [TESTS] * 3)) == [1.0, 0.0, 1.0]
    with pytest.raises(InputError, match=r"python_tests needs tests .* 1 of 2 prompts have none"):
        per_prompt("python_tests", [ADD, ADD], [TESTS, None])


def test_code_is_refused_until_somebody_allows_it(monkeypatch) -> None:
    monkeypatch.setattr(isolation, "start", lambda *_, **__: pytest.fail("a process was started"))
    for call in (
        lambda: check_metric("python_tests"),
        lambda: per_prompt("python_tests", [ADD], [TESTS]),
        lambda: judge_code([ADD], [TESTS]),
        lambda: run_program(ADD, TESTS, QUICK),
    ):
        with pytest.raises(InputError, match="--allow-code-execution"):
            call()
    with code_execution(False), pytest.raises(InputError, match="--allow-code-execution"):
        check_metric("python_tests")


# What each hostile program ends in, wherever it runs.
HOSTILE = {
    "endless loop": ("while True:\n    pass", "time"),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "error"),
    "thread bomb": ("import threading\nwhile True:\n    threading.Thread(target=print).start()", "error"),
    "another program": ("import subprocess\nsubprocess.run(['sleep', '60'])", "error"),
    "background child": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    __import__('time').sleep(60)",
        "error",
    ),
    "memory hog": ("kept = bytearray(10**9)", "memory"),
    "memory in small parts": ("kept = []\nwhile True:\n    kept.append(bytearray(10**6))", "memory"),
    "large file": ("open('big', 'wb').write(bytes(3 << 20))", "error"),
    "endless output": ("while True:\n    print('a' * 10**6)", "time"),
    "an early end": ("import os\nos._exit(0)", "left early"),
    "an exit": ("raise SystemExit(0)", "left early"),
    "an exit in a test": ("def add(a, b):\n    raise SystemExit(0)", "left early"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "left early"),
    "its own end": ("import os\nos.kill(os.getpid(), 15)\nos._exit(0)", "left early"),
    "deep recursion": ("def add(a, b):\n    return add(a, b)", "error"),
    "an error without words": (
        "class E(Exception):\n    def __str__(self):\n        raise E\nraise E",
        "error",
    ),
    "printed verdicts": ('print(\'{"verdict": "right", "key": "0"}\')\nimport os\nos._exit(0)', "left early"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_stopped_and_counted(name: str) -> None:
    program, verdict = HOSTILE[name]
    begun = time.monotonic()
    found = run_program(program, TESTS, QUICK)
    assert found.verdict == verdict, found
    assert time.monotonic() - begun < QUICK.seconds + 2


def test_a_sleeping_program_is_killed_with_its_process() -> None:
    quick = CodeLimits(0.6, QUICK.process)
    assert run_program("import time\ntime.sleep(60)", "", quick).verdict == "time"
    # Out of its group: it ends all the same, with the process that waits for it.
    marker = f"{os.getpid()}{time.time_ns()}"
    assert (
        run_program(f"import os, time\nos.setsid()\ntime.sleep(60)  # {marker}", "", quick).verdict == "time"
    )
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _children():
        time.sleep(0.05)
    assert not _children()


def _children() -> list[Path]:
    """Isolated processes that are still there, where the system lists processes as files."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"isolation_worker.py" in (words := file.read_bytes()) and b"code_worker" in words:
                found.append(file)
    return found


def test_the_environment_is_empty(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = "import os\nassert not {n for n in os.environ if n != 'LC_CTYPE'}, list(os.environ)"
    assert run_program(seen, "", QUICK).verdict == "right"


def test_the_files_and_processes_of_others_are_out_of_reach(cut_off, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outside = Path(__file__).with_name("written_by_a_program")
    for program in (
        f"open({str(outside)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.remove({__file__!r})",
        "open('/etc/passwd', 'a')",
        "import os\nos.mkdir('/var/tmp/made_by_a_program')",
        "open('/proc/1/environ')",
        "import os\nassert os.listdir('/run')",
        f"import os\nos.kill({os.getpid()}, 15)",
    ):
        assert run_program(program, "", QUICK).verdict in ("error", "wrong"), program
    assert not outside.exists()
    assert not list(tmp_path.iterdir())
    # Its own folder it may use, and nothing of that is left.
    found = run_program(
        "open('x', 'w').write('1')\nimport os\nhere = os.getcwd()", "assert open('x').read() == '1'", QUICK
    )
    assert found.verdict == "right"


def test_it_cannot_kill_who_waits_for_it(cut_off) -> None:
    program = "import os\nassert os.getppid() == 0\nos.kill(-1, 9)\nos.kill(1, 9)"
    assert run_program(program, "", QUICK).verdict in ("error", "left early")
    assert run_program(ADD, TESTS, QUICK).verdict == "right"


def test_it_reaches_no_network(cut_off) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard: list[object] = []
        server.settimeout(2)

        def listen() -> None:
            with contextlib.suppress(OSError):
                heard.append(server.accept())

        listener = threading.Thread(target=listen)
        listener.start()
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert run_program(program, "", QUICK).verdict == "error"
        listener.join()
    assert not heard


def test_a_program_that_forges_the_harness_own_answer_is_found(monkeypatch) -> None:
    """It looks for the key in its callers and answers for them; tests that must fail give it away."""
    forger = """
import json, os, sys
frame = sys._getframe()
while 'job' not in frame.f_locals:
    frame = frame.f_back
key, answer = frame.f_locals['job']['key'], frame.f_locals['answer']
os.write(answer, json.dumps({'key': key, 'verdict': 'right', 'detail': '', 'isolated': []}).encode() + b'\\n')
os._exit(0)
"""
    assert run_program(forger, "assert False", QUICK).verdict == "right"
    assert judge_code([forger], [TESTS], QUICK) == ["forged"]


def test_without_namespaces_the_limits_hold_and_the_user_is_told(monkeypatch, tmp_path: Path, capsys) -> None:
    """As on a system that gives them to nobody."""
    worker = tmp_path / "isolation_worker.py"
    worker.write_text(isolation.ENTRY.read_text().replace('hasattr(library, "unshare")', "False"))
    tmp_path.chmod(0o755)
    monkeypatch.setattr(isolation, "ENTRY", worker)
    if isolation.nobody() is not None:  # whose Python others cannot read says so and stops
        monkeypatch.setattr(isolation, "nobody", lambda: None)
    with code_execution(True):
        assert "does not let it be cut off from: network, processes, files" in capsys.readouterr().err
        assert run_program(ADD, TESTS, QUICK).verdict == "right"
        assert run_program(HOSTILE["endless loop"][0], "", QUICK).verdict == "time"
        assert run_program(HOSTILE["memory hog"][0], "", QUICK).verdict == "memory"
        parent = "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(60)"
        assert run_program(parent, "", QUICK).verdict == "left early"
        assert run_program(ADD, TESTS, QUICK).verdict == "right"


def test_a_python_that_cannot_be_run_is_named(monkeypatch) -> None:
    monkeypatch.setattr(code, "WORKER", Path(os.devnull))
    said = r"--allow-code-execution: not even an honest program runs here .*Python"
    with pytest.raises(InputError, match=said), code_execution(True):
        pass


def test_program_of_an_answer() -> None:
    assert program_of("no fence") == "no fence"
    assert program_of("  ```Python\n  x = 1\n  ```") == "x = 1\n"
    assert program_of("```json\n{}\n```\n```python\nx\n```") == "x\n"
    assert program_of("```python\nnever closed") == "never closed"
