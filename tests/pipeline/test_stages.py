"""Stages: reuse, invalidation and what a kill leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deferral_train.errors import InputError
from deferral_train.pipeline.stages import RUN_FILE, Stage, StageRunner, open_run


def two_stages(folder: Path, log: list[str], text: str = "one") -> list[Stage]:
    def write(_results):
        log.append("write")
        (folder / "a").mkdir(exist_ok=True)
        (folder / "a" / "text").write_text(text)
        return {"length": len(text)}

    def double(results):
        log.append("double")
        (folder / "b").write_text((folder / "a" / "text").read_text() * 2)
        return {"length": 2 * results["write"]["length"]}

    return [
        Stage("write", "writes", {"text": text}, (), ("a",), write),
        Stage("double", "doubles", {}, ("write",), ("b",), double),
    ]


def test_second_run_reuses_both_and_returns_the_same_results(tmp_path):
    log: list[str] = []
    first = StageRunner(tmp_path).run(two_stages(tmp_path, log))
    second = StageRunner(tmp_path).run(two_stages(tmp_path, log))
    assert log == ["write", "double"]
    assert [record.reused for record in second.values()] == [True, True]
    assert {n: r.result for n, r in first.items()} == {n: r.result for n, r in second.items()}


def test_changed_setting_reruns_it_and_everything_after(tmp_path):
    log: list[str] = []
    StageRunner(tmp_path).run(two_stages(tmp_path, log))
    records = StageRunner(tmp_path).run(two_stages(tmp_path, log, text="seven"))
    assert log == ["write", "double"] * 2
    assert records["double"].result == {"length": 10}


@pytest.mark.parametrize("damage", ["change", "remove", "marker"])
def test_damaged_output_or_marker_is_not_taken_for_finished(tmp_path, damage):
    log: list[str] = []
    StageRunner(tmp_path).run(two_stages(tmp_path, log))
    if damage == "change":
        (tmp_path / "a" / "text").write_text("eno")
    elif damage == "remove":
        (tmp_path / "a" / "text").unlink()
    else:
        (tmp_path / "stages" / "write.json").write_text('{"key": "tru')
    records = StageRunner(tmp_path).run(two_stages(tmp_path, log))
    assert log[:3] == ["write", "double", "write"]
    assert (tmp_path / "b").read_text() == "oneone"
    assert records["write"].reused is False


def test_stage_killed_halfway_is_run_again(tmp_path):
    """A real process, killed by SIGKILL after its output exists but before its marker does."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from deferral_train.pipeline.stages import Stage, StageRunner
        folder, die = Path(sys.argv[1]), sys.argv[2] == "die"
        def work(_):
            (folder / "out").write_text("whole")
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            return "done"
        record = StageRunner(folder).run([Stage("s", "t", {}, (), ("out",), work)])["s"]
        print(record.reused, record.result)
        """
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), word],
            capture_output=True,
            text=True,
            env=environment,
        )
        for word in ("die", "live", "live")
    ]
    assert runs[0].returncode == -signal.SIGKILL
    assert runs[1].stdout.split() == ["False", "done"]
    assert runs[2].stdout.split() == ["True", "done"]


def test_fresh_starts_over_but_never_empties_a_foreign_folder(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is no run folder"):
        open_run(foreign, {}, fresh=True)
    assert (foreign / "thesis.txt").read_text() == "mine"

    run = open_run(tmp_path / "run", {"seed": 0}, fresh=False)
    (run / "left").write_text("over")
    open_run(run, {"seed": 0}, fresh=True)
    assert not (run / "left").exists()
    assert (run / RUN_FILE).is_file()


def test_a_replacing_stage_clears_what_other_settings_left_but_not_its_own_unfinished_work(tmp_path):
    seen = []

    def work(_):
        folder = tmp_path / "made"
        seen.append(sorted(path.name for path in folder.glob("*")) if folder.is_dir() else [])
        folder.mkdir(exist_ok=True)
        (folder / f"part{len(seen)}").write_text("x")
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    def stage(limit):
        return Stage("s", "title", {"limit": limit}, (), ("made",), work, replace=True)

    with pytest.raises(KeyboardInterrupt):
        StageRunner(tmp_path).run([stage(1)])
    StageRunner(tmp_path).run([stage(1)])
    StageRunner(tmp_path).run([stage(2)])
    assert seen == [[], ["part1"], []]
    assert [path.name for path in (tmp_path / "made").glob("*")] == ["part3"]
