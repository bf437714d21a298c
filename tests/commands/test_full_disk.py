"""Each write of a command finds the disk full, in turn: one line names the file; what was there can still be read."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from fuzz.commands import call, make_world, words_of

from deferral_train import DeferralHead
from deferral_train.decoding.outputs import read_lines
from deferral_train.evaluation.evidence import read_evidence
from deferral_train.traces import open_traces


class FullDisk:
    """From its ``number``-th write on, the disk takes ``room`` bytes and no more."""

    def __init__(self, number: int, below: Path) -> None:
        self.number, self.below, self.writes = number, below, 0

    def fail(self) -> None:
        self.writes += 1
        if self.writes >= self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace

        def opened(file, mode="r", *arguments, **named):
            found = real_open(file, mode, *arguments, **named)
            if not any(letter in mode for letter in "wax+") or not isinstance(file, str | Path):
                return found
            if not Path(file).absolute().is_relative_to(self.below):
                return found
            return Written(found, self)

        def synced(handle):
            if not stat.S_ISDIR(os.fstat(handle).st_mode):  # of a folder it may fail without harm
                self.fail()
            real_fsync(handle)

        def replaced(source, target, **named):
            self.fail()
            real_replace(source, target, **named)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)


class Written:
    """A file whose writes may find the disk full: then half of what was given is there."""

    def __init__(self, file, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data):
        try:
            self._disk.fail()
        except OSError:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    (folder / "run" / "report.html").write_text("the page before")
    shutil.copytree(folder / "run" / "evaluation", folder / "evaluation")
    shutil.rmtree(folder / "run" / "evaluation")
    code, text = call(words_of("export", folder), folder)
    assert code == 0, text
    return folder


def rows(folder: Path) -> list[tuple]:
    return sorted((row["rule"], row["repetition"], str(row["id"]), tuple(row["tokens"])) for row in
                  read_lines(folder / "outputs.jsonl"))  # fmt: skip


def check_export(now: Path, world: Path) -> None:
    assert DeferralHead.from_pretrained(now / "exported").metadata["alpha"] in (0.2, 0.5)


def check_choose(now: Path, world: Path) -> None:
    assert DeferralHead.from_pretrained(now / "head").metadata["alpha"] in (0.1, 0.0)
    read_evidence(now / "decode")
    for path in (now / "choice").glob("*.json"):
        json.loads(path.read_text())


def check_evaluate(now: Path, world: Path) -> None:
    assert json.loads((now / "evaluation" / "scores.json").read_text())["points"]
    assert len(open_traces(now / "traces", verify=True)) > 0


def check_report(now: Path, world: Path) -> None:
    page = (now / "run" / "report.html").read_text()
    assert page == "the page before" or page.rstrip().endswith("</html>")


def check_decode(now: Path, world: Path) -> None:
    code, text = call(words_of("decode", now), now)  # there is room again
    assert code == 0, text
    assert rows(now / "decode") == rows(world / "decode")


CASES = {
    "export": (["export", "--checkpoint", "head", "--out", "exported", "--alpha", "0.5"], check_export),
    "choose": (
        ["choose", "--outputs", "decode", "--metric", "exact_match", "--max-loss", "0.9", "--rule", "learned:head=head",
         "--head", "head", "--out", "choice"],
        check_choose,
    ),
    "evaluate": (
        ["evaluate", "--traces", "traces", "--rules", "opt", "--grid", "3", "--bootstrap", "0", "--figures", "false",
         "--out", "evaluation"],
        check_evaluate,
    ),
    "report": (["report", "run"], check_report),
    "decode": (None, check_decode),
}  # fmt: skip


@pytest.mark.parametrize("command", CASES)
def test_whichever_write_fails_nothing_is_lost(command, world, tmp_path, monkeypatch):
    words, check = CASES[command]
    failed = 0
    for number in range(1, 60):
        now = tmp_path / "now"
        shutil.rmtree(now, ignore_errors=True)
        shutil.copytree(world, now)
        if words is None:  # decode from nothing
            shutil.rmtree(now / "decode")
        disk = FullDisk(number, now)
        with monkeypatch.context() as patch:
            disk.install(patch)
            code, text = call(words or words_of("decode", now), now)
        if code == 0:
            assert (
                disk.writes < number or command == "report"
            )  # its curves for TensorBoard are written beside
            break
        failed += 1
        assert code == 2
        assert "No space left on device: '" in text or "the disk is full at" in text, text
        assert len([line for line in text.splitlines() if ": error:" in line]) == 1
        check(now, world)
        if command == "decode" and number > 6:  # later batches are like the first
            break
    assert failed >= 3
