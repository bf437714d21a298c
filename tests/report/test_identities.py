"""A wrong report cannot be written: each identity, broken in a copy of a good run, is refused by file and
name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deferral_train.errors import InputError
from deferral_train.report import load_run, write_report


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    for part in ("decode", "evaluation"):
        shutil.copytree(run_folder / part, tmp_path / "run" / part)
    return tmp_path / "run"


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_line(path: Path, change: Callable[[Any], None]) -> None:
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    change(row)
    path.write_text("\n".join([json.dumps(row), *rest]) + "\n")


def test_a_sound_run_loads(copy: Path) -> None:
    run = load_run(copy)
    assert run.scores is not None
    assert len(run.outputs) == 48


def bump(name: str) -> Callable[[Any], None]:
    def change(row: Any) -> None:
        row["counts"][name] += 1

    return change


OUTPUTS = {
    "drafted = kept": bump("drafted"),
    "emitted = kept": bump("bonus"),
    "emitted = number of tokens": lambda row: row["tokens"].pop(),
    "deferred <= decided": lambda row: row["counts"].update(deferred=10**6),
}


@pytest.mark.parametrize("identity", OUTPUTS)
def test_counts_that_do_not_add_up(copy: Path, identity: str) -> None:
    edit_line(copy / "decode" / "outputs.jsonl", OUTPUTS[identity])
    with pytest.raises(InputError, match=rf"outputs\.jsonl.*{identity}"):
        write_report(copy)
    assert not (copy / "report.html").exists()


def opt_point(scores: Any) -> Any:
    return next(point for point in scores["points"] if point["rule"] == "opt")


SCORES = {
    "0 <= rejection_rate <= 1": lambda s: opt_point(s)["rejection_rate"].update(value=1.2),
    "calls_per_token": lambda s: opt_point(s)["calls_per_token"].update(value=0.01),
    "hindsight_excess >= 0": lambda s: opt_point(s)["hindsight_excess"].update(value=-0.01),
    "risk \\+ alpha": lambda s: opt_point(s)["risk"].update(value=opt_point(s)["risk"]["value"] + 0.01),
    "low <= high of risk": lambda s: opt_point(s)["risk"].update(low=0.9, high=0.1),
}


@pytest.mark.parametrize("identity", SCORES)
def test_scores_that_contradict_themselves(copy: Path, identity: str) -> None:
    edit(copy / "evaluation" / "scores.json", SCORES[identity])
    with pytest.raises(InputError, match=rf"scores\.json: opt.*{identity}"):
        load_run(copy)


def test_a_summary_of_other_outputs(copy: Path) -> None:
    def change(summary: Any) -> None:
        summary["rules"]["lossless"]["counts"]["verifier_calls"] += 1

    edit(copy / "decode" / "summary.json", change)
    with pytest.raises(InputError, match=r"summary\.json: lossless.*verifier_calls = sum over outputs"):
        load_run(copy)


def test_folders_that_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_run(tmp_path / "absent")
    with pytest.raises(InputError, match="holds nothing to report"):
        load_run(tmp_path)
    (tmp_path / "verdict.json").write_text("{broken")
    with pytest.raises(InputError, match=r"verdict\.json is no JSON"):
        load_run(tmp_path)
