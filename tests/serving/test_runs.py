"""`run` and `rounds` with engine vllm, on a tiny random pair made on the spot: end to end, killed, gone on with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from engines import save_pair

from deferral_train import cli
from deferral_train.decoding.outputs import read_lines
from deferral_train.errors import InputError
from deferral_train.evaluation.evidence import read_evidence
from deferral_train.pipeline.config import PARTS, read_config
from deferral_train.pipeline.contents import check_values

pytestmark = pytest.mark.timeout(900)  # an engine is started nine times for a run

COMMAND = "import sys; from deferral_train.cli import main; raise SystemExit(main(sys.argv[1:]))"
# In a process of its own the engine would bind its thread to the core that a neighbour has.
ENVIRONMENT = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
COUNTS = {"fit": 30, "validation": 20, "calibration": 24, "test": 20}


def write_part(path, start, count):
    generator = np.random.default_rng(start)

    def words(least, most):
        size = generator.integers(least, most + 1)
        return " ".join(f"w{number}" for number in generator.integers(0, 30, size))

    rows = [
        {"id": str(start + number), "prompt": f"w{number % 30} {words(3, 7)}", "reference": words(4, 9)}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_pair(folder)
    for place, (part, count) in enumerate(COUNTS.items()):
        write_part(folder / f"{part}.jsonl", 1000 * place, count)
    config = {
        "engine": "vllm",
        "text": {part: {"path": str(folder / f"{part}.jsonl")} for part in PARTS},
        "pair": {
            "drafter": str(folder / "drafter"),
            "verifier": str(folder / "verifier"),
            "device": "cpu",
            "dtype": "float32",
        },
        "traces": {"temperature": 0.0, "log_top_k": 8},
        "heads": {"candidates": {"gap": {"head": "gap", "hidden": [4], "epochs": 1}}},
        "point": {"max_loss": 0.6, "shares": [0.5]},
        "decode": {
            "limit": 20,
            "num_draft_tokens": 3,
            "max_new_tokens": 12,
            "batch_size": 8,
            "repetitions": 2,
        },
        "rules": ["opt", "token_v3"],
        "decoded": ["opt"],
        "bootstrap": 50,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def finished(config_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(["run", "--config", str(config_path), "--out", str(out)]) == 0
    return out


def loaded(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.mark.engine
def test_a_run_in_the_engine_ends_in_served_tokens_a_second(finished, config_path):
    summary, verdict = loaded(finished / "decode" / "summary.json"), loaded(finished / "verdict.json")
    ran = summary["rules"]["lossless"]["ran"]
    assert ran["engine"].startswith("vllm 0.")
    assert (ran["runner"], ran["device"], ran["dtype"]) == ("V1", "cpu", "float32")
    assert summary["rules"]["lossless"]["quality"] == summary["rules"]["verifier_only"]["quality"]
    served = loaded(finished / "served.json")
    assert [load["at_once"] for load in served["loads"]] == [1, 8, 32]
    label = verdict["chosen"]["label"]
    for load in served["loads"]:
        rows = list(read_lines(finished / "served" / f"at-{load['at_once']}" / "outputs.jsonl"))
        batches = list(read_lines(finished / "served" / f"at-{load['at_once']}" / "batches.jsonl"))
        speeds = {}
        for rule in ("verifier_only", "lossless", label):
            for repetition in (0, 1):
                tokens = sum(
                    len(row["tokens"])
                    for row in rows
                    if (row["rule"], row["repetition"]) == (rule, repetition)
                )
                seconds = sum(
                    b["seconds"] for b in batches if (b["rule"], b["repetition"]) == (rule, repetition)
                )
                speeds.setdefault(rule, []).append(tokens / seconds)
            own = load["tokens_per_second"][rule]
            assert own["value"] == pytest.approx(np.mean(speeds[rule]))  # of two the median is the mean
            assert (own["lowest"], own["highest"]) == pytest.approx((min(speeds[rule]), max(speeds[rule])))
        for rule in ("verifier_only", "lossless"):
            ratios = np.divide(speeds[label], speeds[rule])
            assert load["against"][rule]["value"] == pytest.approx(ratios.mean())
        assert len({row["id"] for row in rows}) == load["prompts"]
    assert "served tokens/s at 1, 8 and 32 requests at once" in verdict["headline"]
    assert ran["engine"] in verdict["headline"]
    assert any("Served speeds are medians of 2 repetition(s)" in said for said in verdict["trust"])
    pays = any(
        all(load["against"][name]["value"] > 1 for name in ("verifier_only", "lossless"))
        for load in served["loads"]
    )
    assert pays or any("at no load" in reason for reason in verdict["reasons"])


@pytest.mark.engine
def test_its_page_names_engine_runner_and_version(finished):
    page, ran = (finished / "report.html").read_text(), loaded(finished / "served.json")["ran"]
    assert f"Decoded by {ran['engine']}, V1 runner, cpu, float32." in page
    assert "Served tokens a second" in page
    assert "no speculation" in page


@pytest.mark.engine
def test_its_certificate_was_measured_in_the_engine(finished):
    """And its own prefixes, laid out as the engine lays blocks, predict what the engine counts."""
    evidence = read_evidence(finished / "calibration")
    assert evidence.conditions["engine"].startswith("vllm")
    verdict = loaded(finished / "verdict.json")
    certificate = verdict["chosen"]["certificate"]
    if certificate is not None:
        assert verdict["engine_note"] == "Its certificate was measured in this engine."
    skew = loaded(finished / "evaluation" / "skew.json")
    for row in skew["rows"]:
        assert row["counted"] == pytest.approx(row["predicted"], rel=0.02), row["quantity"]
    assert skew["meta"]["agree"] == skew["meta"]["of"]


def numbers_of(folder):
    """What must not depend on kills: texts and counts of every decoding, points, risks; times do."""
    found = {}
    for name in ("calibration", "decode", "served/at-1", "served/at-8", "served/at-32"):
        rows = read_lines(folder / name / "outputs.jsonl")
        found[name] = sorted(
            (row["rule"], row["repetition"], row["id"], row["tokens"], sorted(row["counts"].items()))
            for row in rows
        )
    verdict = loaded(folder / "verdict.json")
    found["verdict"] = {name: verdict[name] for name in ("calls_saved", "quality", "loss_bound", "risk")} | {
        name: verdict["chosen"][name] for name in ("label", "value")
    }
    found["point"] = loaded(folder / "point.json")["points"]
    found["skew"] = loaded(folder / "evaluation" / "skew.json")
    return json.loads(json.dumps(found).replace(str(folder), ""))


@pytest.mark.slow
@pytest.mark.engine
def test_a_killed_run_goes_on_and_gives_the_same_numbers(finished, config_path, tmp_path):
    out = tmp_path / "killed"
    words = [sys.executable, "-c", COMMAND, "run", "--config", str(config_path), "--out", str(out)]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = out / "decode" / "batches.jsonl"
    while process.poll() is None and not (path.is_file() and path.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.kill()
    said = process.communicate()[0].decode()
    assert path.is_file(), said[-3000:]
    assert not (out / "stages" / "decode.json").exists()
    again = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert numbers_of(out) == numbers_of(finished)


@pytest.mark.engine
def test_a_finished_run_starts_no_engine(finished, config_path, monkeypatch):
    from deferral_train.serving import running

    monkeypatch.setattr(running, "Engine", None)
    before = loaded(finished / "verdict.json")
    assert cli.main(["run", "--config", str(config_path), "--out", str(finished)]) == 0
    assert loaded(finished / "verdict.json") == before


@pytest.mark.engine
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "sglang"}, "engine='sglang': use transformers or vllm"),
        ({"pair.device_map": "auto"}, "pair.device_map='auto' with engine vllm"),
        ({"pair.drafter_device": "cpu"}, "pair.drafter_device='cpu' with engine vllm"),
        ({"rules": ["opt", "chow:mode=x"]}, "rules"),
        (
            {"frontier.temperatures": [0.0], "frontier.token_cascades": ["chow:alpha=0.5"]},
            "frontier: cascade chow:alpha=0.5 with engine vllm",
        ),
    ],
)
def test_what_a_run_in_the_engine_cannot_do_is_refused_by_name(changes, message, config_path, tmp_path):
    given = yaml.safe_load(config_path.read_text())
    for name, value in changes.items():
        *sections, key = name.split(".")
        own = given
        for section in sections:
            own = own.setdefault(section, {})
        own[key] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(InputError) as raised:
        check_values(read_config(path))
    assert message in str(raised.value)


@pytest.mark.engine
def test_a_pair_that_the_engine_does_not_serve_is_refused_at_the_pair_stage(config_path, tmp_path, capsys):
    from tiny_models import save_tiny_pair

    save_tiny_pair("t5", tmp_path / "t5")
    given = yaml.safe_load(config_path.read_text())
    given["pair"] |= {role: str(tmp_path / "t5" / role) for role in ("drafter", "verifier")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given))
    assert cli.main(["run", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "is an encoder-decoder" in capsys.readouterr().err
    assert not (tmp_path / "out" / "traces").exists()


def rounds(folder, out, engine):
    words = ["rounds", "--drafter", str(folder / "drafter"), "--verifier", str(folder / "verifier")]
    words += ["--prompts", str(folder / "fit.jsonl"), "--validation", str(folder / "validation.jsonl")]
    words += ["--out", str(out), "--rounds", "1", "--max_new_tokens", "12", "--num_draft_tokens", "3"]
    return [*words, "--device", "cpu", "--dtype", "float32", "--engine", engine, "--length_tolerance", "0.9"]


@pytest.mark.slow
@pytest.mark.engine
def test_rounds_in_the_engine_are_those_of_the_loop(config_path, tmp_path):
    """Its blocks lie as the engine lays them; labels, heads and texts then agree, killed between or not."""
    folder = config_path.parent
    assert cli.main(rounds(folder, tmp_path / "vllm", "vllm")) == 0
    found = loaded(tmp_path / "vllm" / "rounds.json")
    assert found["ran"]["engine"].startswith("vllm")
    assert [one["round"] for one in found["rounds"]] == [0, 1]
    assert cli.main(rounds(folder, tmp_path / "loop", "transformers")) == 0
    loop = loaded(tmp_path / "loop" / "rounds.json")
    assert "ran" not in loop
    # Round 0 labels along the verifier's own text: the same labels, fit and quantiles of estimates.
    assert found["rounds"][0]["labelled"] == loop["rounds"][0]["labelled"] > 40
    assert found["scales"] == pytest.approx(loop["scales"])
    assert found["lossless"]["scores"] == pytest.approx(loop["lossless"]["scores"])
    ours, theirs = (one["rounds"][0]["candidates"][0]["points"] for one in (found, loop))
    assert sorted(point["alpha"] for point in ours) == pytest.approx(
        sorted(point["alpha"] for point in theirs)
    )
    # What the last round left is taken away: the rest is taken as it is.
    shutil.rmtree(tmp_path / "vllm" / "round-1")
    for gone in ("rounds.json", "traces/round-1/shard-00000.arrow"):
        (tmp_path / "vllm" / gone).unlink()
    assert cli.main(rounds(folder, tmp_path / "vllm", "vllm")) == 0
    assert loaded(tmp_path / "vllm" / "rounds.json")["rounds"] == found["rounds"]
