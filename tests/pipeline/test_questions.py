"""The first run at a size for tests: database, questions, pair, certificate, answers and page; the same after kills."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deferral_train import cli, provenance
from deferral_train.errors import InputError
from deferral_train.evaluation.sql import RIGHT, judge
from deferral_train.pipeline.config import PARTS, read_config
from deferral_train.pipeline.learning import learn_in_rounds
from deferral_train.pipeline.run import Run
from deferral_train.pipeline.run import run as run_stages
from deferral_train.traces import open_traces

SIZES = {"pair": 400, "fit": 40, "validation": 24, "calibration": 40, "test": 26, "test_shapes": 6}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> Path:
    """A pair of a few thousand parameters, trained for seconds: it answers next to nothing, and the run must say so."""
    config = {
        "text": {"questions": SIZES},
        "pair": {
            "device": "cpu",
            "dtype": "float32",
            "train": {
                "vocab_size": 400,
                "context": 128,
                "drafter": {"layers": 1, "width": 16, "heads": 1, "feed_forward": 32},
                "verifier": {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64},
                "drafter_schedule": {"steps": 60, "batch": 6, "learning_rate": 3.0e-3},
                "verifier_schedule": {"steps": 80, "batch": 6},
                "checkpoint_seconds": 0.2,
            },
        },
        "traces": {"temperature": 0.0, "log_top_k": 8, "chunk_prompts": 16},
        "heads": {"candidates": {"gap": {"head": "gap", "hidden": [16], "epochs": 3, "batch_size": 256}}},
        "decode": {
            "limit": 26,
            "num_draft_tokens": 3,
            "max_new_tokens": 12,
            "batch_size": 16,
            "timed": 3,
            "repetitions": 1,
        },
        "point": {"max_loss": 0.5, "shares": [0.6, 0.3]},
        "rules": ["chow", "opt"],
        "decoded": [],
        "bootstrap": 50,
        "on_policy": 20,
        "control": "The control: 1 < 2.",
    }
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def finished(config_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(["run", "--config", str(config_path), "--out", str(out)]) == 0
    return out


def test_predictions_are_held_against_counts_on_as_many_prompts_as_asked_for(finished):
    rows = json.loads((finished / "evaluation" / "skew.json").read_text())["rows"]
    assert {row["prompts"] for row in rows} == {20}


def test_accuracy_is_what_executing_the_outputs_again_gives(finished):
    rows = [json.loads(line) for line in (finished / "decode" / "outputs.jsonl").read_text().splitlines()]
    answers = json.loads((finished / "evaluation" / "answers.json").read_text())
    summary = json.loads((finished / "decode" / "summary.json").read_text())["rules"]
    database = finished / "data" / "stdlib.sqlite"
    for rule, right in answers["right"].items():
        own = [row for row in rows if row["rule"] == rule]
        verdicts = judge(database, [row["text"] for row in own], [row["reference"] for row in own])
        assert right == pytest.approx(verdicts.count(RIGHT) / len(own))
        assert summary[rule]["quality"][f"sql:{database}"] == pytest.approx(right)
        assert sum(answers["errors"][rule].values()) == len(own) - verdicts.count(RIGHT)
    assert {"verifier_only", "lossless", "drafter_only", answers["chosen"]} <= set(answers["right"])
    assert len(answers["examples"]) == 3


def test_the_verdict_speaks_of_answers_and_the_page_begins_with_it(finished):
    verdict = json.loads((finished / "verdict.json").read_text())
    answers = json.loads((finished / "evaluation" / "answers.json").read_text())
    assert verdict["quality"]["metric"] == "answers right, in percent"
    assert verdict["quality"]["lossless"] == pytest.approx(100 * answers["right"]["lossless"])
    page = (finished / "report.html").read_text()
    head, _, rest = page.partition("</h1>")
    assert f"Of {SIZES['test']} new questions the large model alone (the verifier) answers" in head
    assert 'id="answers"' in rest
    assert rest.index('id="answers"') < rest.index('id="numbers"')
    assert rest.count("<article") == 3
    assert "<li>The control: 1 &lt; 2.</li>" in rest


def test_speeds_are_of_the_prompts_decoded_one_by_one(finished):
    batches = [json.loads(line) for line in (finished / "timing" / "batches.jsonl").read_text().splitlines()]
    assert {batch["rows"] for batch in batches} == {1}
    summary = json.loads((finished / "decode" / "summary.json").read_text())["rules"]["lossless"]
    timed = json.loads((finished / "timing" / "summary.json").read_text())["rules"]["lossless"]
    assert summary["ms_per_token"] == timed["ms_per_token"]
    assert (summary["prompts"], timed["prompts"]) == (SIZES["test"], 3)


def test_dials_come_from_validation_and_the_certificate_from_calibration(finished):
    from deferral_train.pipeline import operating_point
    from deferral_train.traces import open_traces

    point = json.loads((finished / "point.json").read_text())
    tried = json.loads((finished / "calibration" / "summary.json").read_text())["rules"]
    plug_in = point["best_plug_in"]
    spread = operating_point.spread(
        open_traces(finished / "traces" / "validation"), {plug_in: plug_in}, (0.6, 0.3), 0.0, 3
    )
    expected = {f"{plug_in}:{parameter}={value:g}" for parameter, value in spread[plug_in]}
    assert expected <= set(tried)
    assert len({label.rpartition(":")[0] for label in tried} - {""}) <= 2
    assert tried["lossless"]["prompts"] == SIZES["calibration"]


def test_killed_in_every_stage_gives_the_numbers_of_an_uninterrupted_run(
    finished, config_path, tmp_path, warm
):
    out = tmp_path / "killed"
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [warm.python, str(script), str(config_path), str(out), "0"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    killed = [line for line in done.stdout.splitlines() if line.startswith("killed")]
    assert len(killed) == len(Run(read_config(config_path, out=str(out)), out).stages())
    run_stages(read_config(config_path, out=str(out)))
    assert numbers(out) == numbers(finished)


def numbers(folder: Path) -> dict[str, object]:
    """Everything a run found out, timings and folder names aside."""
    rows = [json.loads(line) for line in (folder / "decode" / "outputs.jsonl").read_text().splitlines()]
    answers = json.loads((folder / "evaluation" / "answers.json").read_text())
    scores = json.loads((folder / "evaluation" / "scores.json").read_text())
    point = json.loads((folder / "point.json").read_text())
    traces = {part: open_traces(folder / "traces" / part) for part in PARTS}
    weights = [f"{name}/model.safetensors" for name in ("pair/drafter", "pair/verifier", "head")]
    return {
        "files": [
            provenance.sha256(folder / name) for name in ("data/stdlib.sqlite", "data/test.jsonl", *weights)
        ],
        "traces": {
            part: [provenance.hash_of(opened.column(name).tolist()) for name in sorted(opened.columns)]
            for part, opened in traces.items()
        },
        "points": point["points"],
        "constraint": point["constraint"]["name"],
        "risks": [[p["rule"], p["value"], p.get("risk"), p["rejection_rate"]] for p in scores["points"]],
        "outputs": sorted([r["rule"], r["id"], r["tokens"], r["origin"], r["counts"]] for r in rows),
        "answers": [answers[name] for name in ("right", "errors", "families", "examples", "shapes")],
    }


def test_rounds_label_by_running_the_finished_queries(finished, config_path, tmp_path):
    """`heads.rounds` in a run with questions; this pair answers nothing right, and the refusal says so in one line."""
    folder = tmp_path / "rounds"
    shutil.copytree(finished / "data", folder / "data")
    config = read_config(config_path, out=str(folder))
    config = replace(config, heads=replace(config.heads, rounds=1))
    pair = json.loads((finished / "stages" / "pair.json").read_text())["result"]
    with pytest.raises(InputError, match=r"labels: all \d+ sequence gaps are 0, .* train the pair longer"):
        learn_in_rounds(config, pair, folder)
    labels = open_traces(folder / "rounds" / "traces" / "round-0").manifest.labels
    assert list(labels["metrics"]) == [f"sql:{folder / 'data' / 'stdlib.sqlite'}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": {"questions": {"test": 0}}}, "text.questions.test=0: give at least 1"),
        ({"text": {"questions": {"style": "loud"}}}, "text.questions.style='loud': use drawn or house"),
        ({"point": {"max_loss": 0.5, "shares": [1.5]}}, "point.shares: [1.5]"),
        ({"point": {"metric": "blue"}}, "point: metric is 'blue'"),
        ({"point": {"metric": "sql:/no/such/file"}}, "the database cannot be read"),
        ({"decode": {"timed": 0}}, "timed=0: give at least 1"),
    ],
)
def test_bad_values_are_one_line_and_write_nothing(config_path, tmp_path, capsys, change, said):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(config_path.read_text()), **change}))
    assert cli.main(["run", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()
