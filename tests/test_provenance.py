"""Content keys, differences in words, one writer, and writes that a full disk stops."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from deferral_train import provenance
from deferral_train.errors import InputError


def test_a_content_key_sees_contents_and_nothing_else(tmp_path):
    file, folder = tmp_path / "a", tmp_path / "folder"
    file.write_bytes(b"one")
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b").write_bytes(b"x")
    first, all_of_it = provenance.content_key(file), provenance.content_key(folder)
    os.utime(file, (1, 1))
    (folder / ".deep.lock").write_bytes(b"")
    assert (provenance.content_key(file), provenance.content_key(folder)) == (first, all_of_it)
    file.write_bytes(b"two")
    (folder / "deep" / "b").write_bytes(b"y")
    assert provenance.content_key(file) != first
    assert provenance.content_key(folder) != all_of_it
    assert provenance.content_key(tmp_path / "none") == "absent"


def test_a_large_file_is_known_by_size_time_and_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "HASHED_BYTES", 1 << 20)
    file = tmp_path / "large"
    data = bytearray(2 << 20)
    file.write_bytes(data)
    os.utime(file, ns=(10**18, 10**18))
    before = provenance.content_key(file)
    assert before.startswith("sampled:")
    os.utime(file, ns=(10**18, 10**18))
    assert provenance.content_key(file) == before
    data[-1] = 1  # the last byte lies in a stretch
    file.write_bytes(data)
    os.utime(file, ns=(10**18, 10**18))
    assert provenance.content_key(file) != before
    data[-1] = 0
    file.write_bytes(data)
    assert provenance.content_key(file) != before  # written again: another time


def test_differences_are_told_in_words():
    before = {"lr": 0.1, "same": 1, "data": {"path": "p", "content": "a"}}
    now = {"lr": 0.2, "same": 1, "data": {"path": "p", "content": "b"}}
    assert provenance.changes(before, now) == ["lr: 0.1 -> 0.2", "data: p holds something else than before"]
    with pytest.raises(
        InputError, match=r"F holds a run with other data, lr \(lr: 0.1 -> 0.2; data.*\); do this"
    ):
        provenance.refuse_reuse("F", before, now, "do this")
    with pytest.raises(InputError, match="does not record what it was made from"):
        provenance.refuse_reuse("F", None, now, "do this")
    provenance.refuse_reuse("F", now, now, "do this")


HOLD = """
import sys, time
from deferral_train import provenance
with provenance.one_writer(sys.argv[1], "collect"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_a_folder_and_a_killed_one_lets_go(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with (
        pytest.raises(
            InputError, match=r"another decode is working in .*out; wait for it or name another folder"
        ),
        provenance.one_writer(tmp_path / "out", "decode"),
    ):
        pass
    with provenance.one_writer(tmp_path / "other"):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with provenance.one_writer(tmp_path / "out"):
        pass
    with provenance.one_writer("memory://bucket/out"):  # stores have no locks
        pass


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    provenance.write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*file\.json"):
        provenance.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_an_appended_line_is_whole_or_not_there(tmp_path):
    """A real limit of the system on the size of files, in a process of its own."""
    code = (
        "import resource, sys; from deferral_train import provenance\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    for n in range(20): provenance.append_text(sys.argv[1], f'line {n:010d}\\n')\n"
        "except OSError as error: print(error.filename, n)\n"
    )
    path = tmp_path / "lines"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.split()[0] == str(path), done.stderr
    lines = path.read_text().splitlines()
    assert lines == [f"line {n:010d}" for n in range(int(done.stdout.split()[1]))]
    assert path.read_bytes().endswith(b"\n")
