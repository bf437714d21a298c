"""The whole path on real text at a size for tests: its outputs and their reuse (kills: test_questions.py)."""

from __future__ import annotations

import html
import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from deferral_train import cli
from deferral_train.errors import InputError
from deferral_train.pairs.corpora import code_prompts, stdlib_sources
from deferral_train.pairs.prompts import write_prompts
from deferral_train.pipeline.config import PARTS, read_config
from deferral_train.pipeline.run import Run

LIMITS = {"fit": 48, "validation": 16, "calibration": 16, "test": 12}


def write_config(folder: Path) -> Path:
    """A run on a little of the standard library: a pair of a few thousand parameters, trained for seconds."""
    sources = stdlib_sources()
    text = "".join(document.text for document in sources["pair"][:25])[:200_000]
    (folder / "pair.txt").write_text(text)
    (folder / "heldout.txt").write_text("".join(d.text for d in sources["validation"])[:8_000])
    seen: set[str] = set()  # windows as short as a licence's header are in several files
    for part in PARTS:
        prompts = [p for p in code_prompts(sources[part], 2 * LIMITS[part], 120, 80) if p.prompt not in seen]
        write_prompts(folder / f"{part}.jsonl", prompts[: LIMITS[part]])
        seen.update(prompt.prompt for prompt in prompts[: LIMITS[part]])
    config = {
        "text": {part: {"path": str(folder / f"{part}.jsonl")} for part in PARTS},
        "pair": {
            "device": "cpu",
            "dtype": "float32",
            "train": {
                "text": {"files": [str(folder / "pair.txt")], "heldout": [str(folder / "heldout.txt")]},
                "vocab_size": 400,
                "context": 64,
                "drafter": {"layers": 1, "width": 16, "heads": 1, "feed_forward": 32},
                "verifier": {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64},
                "drafter_schedule": {"steps": 60, "batch": 4, "learning_rate": 3.0e-3},
                "verifier_schedule": {"steps": 80, "batch": 4},
                "checkpoint_seconds": 0.2,
            },
        },
        "traces": {"temperature": 0.0, "log_top_k": 8, "chunk_prompts": 8},
        "heads": {"candidates": {"gap": {"head": "gap", "hidden": [16], "epochs": 3, "batch_size": 256}}},
        "decode": {"limit": 10, "num_draft_tokens": 3, "max_new_tokens": 10, "repetitions": 1},
        "rules": ["chow", "opt", "token_v3"],
        "frontier": {
            "temperatures": [0.0, 1.0],
            "rules": ["opt", "token_v3"],
            "shares": [0.7, 0.3],
            "token_cascades": ["chow:alpha=0.5"],
            "limit": 4,
            "timed": 2,
            "metric": "rouge1",
        },
        "bootstrap": 100,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def finished(config_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(["run", "--config", str(config_path), "--out", str(out)]) == 0
    return out


def test_every_station_left_its_output(finished):
    for name in (
        "pair/drafter/model.safetensors",
        "pair/training_ids.json",
        "traces/fit/manifest.json",
        "fit/gap/checkpoints/best.ckpt",
        "head/model.safetensors",
        "head/config.json",
        "evaluation/scores.json",
        "evaluation/breakdowns.json",
        "decode/summary.json",
        "verdict.json",
        "report.html",
        "run.provenance.json",
    ):
        assert (finished / name).is_file(), name
    assert list((finished / "fit").rglob("events.out.tfevents*"))
    assert json.loads((finished / "head" / "config.json").read_text())["cost"]["microseconds_per_token"] > 0
    decoded = json.loads((finished / "decode" / "summary.json").read_text())["rules"]
    best = json.loads((finished / "point.json").read_text())["best_plug_in"]
    assert set(decoded) == {"verifier_only", "lossless", "opt", "token_v3", "learned", best}


def test_the_verdict_ends_in_a_line_for_the_serving_engine(finished):
    from deferral_train.serving.config import ServingConfig

    verdict = json.loads((finished / "verdict.json").read_text())
    assert verdict["engine_reason"] is None
    words = shlex.split(verdict["engine_line"])
    config = ServingConfig.parse(json.loads(words[words.index("--additional-config") + 1])["deferral"])
    assert config.make_rule().dial_value == verdict["chosen"]["value"]
    assert html.escape("--speculative-config", quote=True) in (finished / "report.html").read_text()


def test_frontier_holds_every_rule_at_every_temperature(finished):
    entries = json.loads((finished / "evaluation" / "frontier.json").read_text())["entries"]
    assert [entry["temperature"] for entry in entries] == [0.0, 1.0]
    names = {"verifier_only", "lossless", "drafter_only", "opt", "token_v3", "learned", "token cascade chow"}
    for entry in entries:
        assert set(entry["points"]) == names
        assert {row["rule"] for row in entry["table2"]} == names - {"verifier_only"}
        assert entry["points"]["verifier_only"][0]["latency"] == 1.0
        assert (entry["prompts"], entry["timed_prompts"], entry["metric"]) == (4, 2, "rouge1")
    greedy = entries[0]["points"]
    assert greedy["lossless"][0]["quality"] == greedy["verifier_only"][0]["quality"]
    assert greedy["lossless"][0]["rejection_rate"] >= max(p["rejection_rate"] for p in greedy["opt"])
    assert len(list((finished / "evaluation" / "frontier").glob("rouge1_against_*_t1.svg"))) == 4


def test_verdict_bounds_the_loss_per_prompt_with_the_certificate(finished):
    from deferral_train.evaluation.choose import choose_from_outputs
    from deferral_train.pipeline.verdict import loss_bound

    bound = json.loads((finished / "verdict.json").read_text())["loss_bound"]
    assert bound["smallest"] <= bound["bound"] + 1e-6
    assert bound["prompts"] == 10
    rows = [json.loads(line) for line in (finished / "decode" / "outputs.jsonl").read_text().splitlines()]
    same = loss_bound(
        [row for row in rows if row["rule"] == "lossless"], "lossless", 0.95, "chrf", "mean sentence chrF"
    )
    assert same["bound"] == pytest.approx(
        same["smallest"], abs=1e-6
    )  # no prompt loses anything against itself
    # `choose` certifies the chosen rule at this very limit, and not below it.
    point = json.loads((finished / "verdict.json").read_text())["chosen"]
    dials = {point["label"]: {"rule": point["rule"], "parameter": "alpha", "value": point["value"]}}
    constraint = {"metric": "chrf", "rule": point["label"], "dials": dials}
    limit = bound["bound"] / 100
    assert choose_from_outputs(rows, max_loss=limit + 1e-6, **constraint).setting.label == point["label"]
    with pytest.raises(InputError):
        choose_from_outputs(rows, max_loss=limit - 1e-3, **constraint)


def test_verdict_proposes_how_to_draft(finished, config_path):
    from deferral_train.decoding.drafting.spec import drafting_from_spec

    found = json.loads((finished / "verdict.json").read_text())["drafting"]
    assert (found["num_draft_tokens"] is None) != (found["drafting"] is None)
    if found["drafting"] is not None:
        drafting_from_spec(found["drafting"])
    assert found["prompts"] == {"chosen_on": 5, "judged_on": 5}
    assert found["used"]["num_draft_tokens"] == 3
    assert found["beats_verifier"] is None  # too few prompts for an interval
    assert "needs more prompts" in found["text"] or "no way to draft" in found["text"]
    assert {row["family"] for row in found["families"]} >= {"drafter alone"}
    assert max(row["speed"] for row in found["families"]) > 0
    assert found["flags"] in (finished / "report.html").read_text()


def test_replayed_texts_give_the_calls_that_were_counted(finished, config_path):
    """On the chosen rule's own texts, at temperature 0, prompt for prompt."""
    from deferral_train.decoding.drafting import Plan
    from deferral_train.decoding.drafting.replay import replay
    from deferral_train.evaluation.drafting import paths_of
    from deferral_train.heads.rules import rule_from_spec
    from deferral_train.pipeline.online import ON_POLICY
    from deferral_train.traces import open_traces

    chosen = json.loads((finished / "verdict.json").read_text())["chosen"]
    rule = rule_from_spec(chosen["spec"], typed=read_config(config_path).rules)
    traces = open_traces(finished / ON_POLICY)
    rows = [json.loads(line) for line in (finished / "decode" / "outputs.jsonl").read_text().splitlines()]
    counts = {row["id"]: row["counts"] for row in rows if row["rule"] == chosen["label"]}
    for name in traces.prompt_ids:
        (path,) = paths_of(traces, rule, {name: [0]}, separate=False)
        work = replay(Plan([[3, 0], [0, 0]], max_gram=None), path)
        assert (work.calls, work.tokens) == (counts[name]["verifier_calls"], counts[name]["emitted"])


def test_lossless_writes_what_the_verifier_alone_writes(finished):
    rows = [json.loads(line) for line in (finished / "decode" / "outputs.jsonl").read_text().splitlines()]
    texts = {
        rule: {r["id"]: r["tokens"] for r in rows if r["rule"] == rule}
        for rule in ("verifier_only", "lossless")
    }
    assert texts["lossless"] == texts["verifier_only"]
    assert len(texts["lossless"]) == 10


def test_choose_reads_the_runs_own_decode_folder(finished, tmp_path, capsys):
    head = tmp_path / "head"
    shutil.copytree(finished / "head", head)
    words = ["--metric", "exact_match", "--max-loss", "0.9", "--rule", "learned", "--head", str(head)]
    assert cli.main(["choose", "--outputs", str(finished / "decode"), *words]) == 0
    assert capsys.readouterr().out.startswith("learned: observed")
    config = json.loads((head / "config.json").read_text())
    learned = json.loads((finished / "decode" / "summary.json").read_text())["rules"]["learned"]
    assert config["certificate"]["metric"] == "exact_match"
    assert config["alpha"] == config["certificate"]["value"] == learned["dial"]["value"]
    assert cli.main(["choose", "--outputs", str(tmp_path / "none"), "--metric", "blue"]) == 2
    assert "metric is 'blue'" in capsys.readouterr().err


def test_a_wish_is_certified_on_the_calibration_part_and_decides_the_verdict(
    finished, config_path, tmp_path, capsys
):
    """Sixteen prompts certify little: a tight constraint is refused with what they can, a loose one is met."""
    out, path = tmp_path / "constraint", tmp_path / "constraint.yaml"
    shutil.copytree(finished, out)
    settings = yaml.safe_load(config_path.read_text())

    def wished(loss: float) -> int:
        path.write_text(yaml.safe_dump({**settings, "frontier": {}, "point": {"max_loss": loss}}))
        return cli.main(["run", "--config", str(path), "--out", str(out)])

    assert wished(0.01) == 2
    error = capsys.readouterr().err
    assert "point.max_loss=0.01 cannot be certified with 16 prompts" in error
    smallest = float(error.split(" is ")[1].split(";")[0])
    assert wished(smallest + 0.15) == 0
    constraint = json.loads((out / "point.json").read_text())["constraint"]
    chosen = json.loads((out / "verdict.json").read_text())["chosen"]
    assert chosen["certificate"] == constraint["certificate"]
    assert (chosen["name"], chosen["value"]) == (constraint["name"], constraint["value"])
    assert constraint["certificate"]["kind"] == "certificate"
    assert constraint["certificate"]["p_value"] <= 0.025  # two rules share the error probability
    decoded = json.loads((out / "decode" / "summary.json").read_text())["rules"]
    assert decoded[constraint["name"]]["dial"]["value"] == constraint["value"]
    # The same outputs, asked by the command, give the same answer; the report shows where it comes from.
    limit = str(constraint["certificate"]["limit"])
    words = ["--outputs", str(out / "calibration"), "--metric", "chrf", "--max-loss", limit]
    assert cli.main(["choose", *words, "--out", str(tmp_path / "choice")]) == 0
    choice = json.loads((tmp_path / "choice" / "choice.json").read_text())
    assert (choice["value"], choice["p_value"]) == (constraint["value"], constraint["certificate"]["p_value"])
    assert "on 16 calibration prompts" in (out / "report.html").read_text()
    config = json.loads((out / "head" / "config.json").read_text())
    assert (config.get("certificate") is not None) is (constraint["name"] == "learned")


def test_second_run_reuses_everything_and_says_so(finished, config_path, capsys):
    before = (finished / "report.html").stat().st_mtime_ns
    assert cli.main(["run", "--config", str(config_path), "--out", str(finished)]) == 0
    told = capsys.readouterr().out
    stages = Run(read_config(config_path, out=str(finished)), finished).stages()
    assert sum("reused" in line for line in told.splitlines()) == len(stages)
    assert (finished / "report.html").stat().st_mtime_ns == before


def test_another_limit_decodes_anew_in_the_same_folder(finished, config_path, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    settings = yaml.safe_load(config_path.read_text())
    settings["decode"]["limit"] = 5
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["run", "--config", str(path), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "decode" / "outputs.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": {}}, "text.fit.path"),
        ({"pair": {"drafter": "only/one"}}, "name drafter and verifier"),
        ({"decoded": ["bild"]}, "decoded: bild"),
        ({"colour": "blue"}, "colour"),
        ({"heads": {"candidates": {}}}, "heads.candidates"),
        ({"point": {"max_loss": 2.0}}, "point.max_loss=2"),
        ({"point": {"confidence": 1.0}}, "point.confidence=1"),
    ],
)
def test_bad_config_is_one_line_and_writes_nothing(config_path, tmp_path, capsys, change, said):
    settings = {**yaml.safe_load(config_path.read_text()), **change}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["run", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_said_before_anything_is_written(config_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10, 10**6))
    assert cli.main(["run", "--config", str(config_path), "--out", str(tmp_path / "out")]) == 2
    assert "free some disk" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_folder_are_refused(config_path, tmp_path, capsys):
    from filelock import FileLock

    with FileLock(tmp_path / ".out.lock"):
        assert cli.main(["run", "--config", str(config_path), "--out", str(tmp_path / "out")]) == 2
    assert "another run is working" in capsys.readouterr().err


def test_prompts_that_the_pair_learned_are_refused(config_path, tmp_path, capsys):
    settings = yaml.safe_load(config_path.read_text())
    sources = stdlib_sources()["pair"][0].text
    block = sources[:4000]
    train = settings["pair"]["train"]
    text = tmp_path / "seen.txt"
    text.write_text(block + "\n")
    train["text"]["files"] = [str(text), *train["text"]["files"]]
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"prompt": block}) + "\n")
    settings["text"]["test"]["path"] = str(path)
    config = tmp_path / "overlap.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert cli.main(["run", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    assert "training text" in capsys.readouterr().err
