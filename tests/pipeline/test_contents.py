"""A run's stages are taken up only from contents that they were made of; every value is checked before the first."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pipeline.test_run import write_config

from deferral_train import cli, provenance
from deferral_train.heads import DeferralHead
from deferral_train.heads.fingerprint import weights_key
from deferral_train.pipeline.config import read_config
from deferral_train.pipeline.run import Run
from deferral_train.pipeline.stages import Stage, StageRunner, open_run
from deferral_train.traces import open_traces
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit

FITTED = ("text", "pair", "traces", "fit")


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def fitted(config_path: Path, out: Path, **heads) -> tuple[dict[str, bool], list[str]]:
    """Run the stages up to the fit; which were reused, and what was said."""
    config = read_config(config_path, out=str(out))
    if heads:
        candidates = {"gap": {**config.heads.candidates["gap"], **heads}}
        config = replace(config, heads=replace(config.heads, candidates=candidates))
    work = Run(config, open_run(out, config, fresh=False))
    said: list[str] = []
    runner = StageRunner(out, explain=said.append)
    records = runner.run([stage for stage in work.stages() if stage.name in FITTED])
    return {name: record.reused for name, record in records.items()}, said


@pytest.fixture(scope="module")
def finished(config_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    reused, said = fitted(config_path, out)
    assert (any(reused.values()), said) == (False, [])
    return out


def test_another_rate_trains_anew_and_gives_what_a_fresh_fit_gives(finished, config_path, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = weights_key(DeferralHead.from_pretrained(out / "fit" / "best"))
    assert fitted(config_path, out) == (dict.fromkeys(FITTED, True), [])
    reused, said = fitted(config_path, out, lr=1e-2)
    assert reused == {"text": True, "pair": True, "traces": True, "fit": False}
    assert "gap.lr: nothing -> 0.01" in said[0]
    after = DeferralHead.from_pretrained(out / "fit" / "best")
    settings = {"head": "gap", "hidden": [16], "epochs": 3, "batch_size": 256, "lr": 1e-2}
    traces = {
        name: open_traces(out / "traces" / part) for name, part in (("train", "fit"), ("val", "validation"))
    }
    alone = fit(FitConfig(**traces, **settings), tmp_path / "alone").head
    assert before != weights_key(after) == weights_key(alone)
    reused, _ = fitted(config_path, out, lr=1e-2, truth="verifier")
    assert not reused["fit"]


def test_prompts_edited_in_place_are_read_again(finished, config_path, tmp_path):
    folder, out = tmp_path / "config", tmp_path / "run"
    shutil.copytree(config_path.parent, folder)
    shutil.copytree(finished, out)
    settings = yaml.safe_load(config_path.read_text())
    for part, source in settings["text"].items():
        source["path"] = str(folder / f"{part}.jsonl")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    fitted(path, out)  # other paths of the same contents
    assert fitted(path, out)[0] == dict.fromkeys(FITTED, True)
    lines = (folder / "fit.jsonl").read_text().splitlines()
    (folder / "fit.jsonl").write_text("\n".join(lines[:-8]) + "\n")
    reused, said = fitted(path, out)
    assert not any(reused[name] for name in ("text", "traces", "fit"))
    assert f"text.fit.path: {folder / 'fit.jsonl'} holds something else than before" in said[0]
    assert len(open_traces(out / "traces" / "fit").prompt_ids) == len(lines) - 8


def test_models_trained_on_in_their_folder_are_seen(finished, config_path, tmp_path):
    """A pair of the user's own, whose verifier is saved again with other weights."""
    from safetensors.torch import load_file, save_file

    pair, out = tmp_path / "pair", tmp_path / "run"
    shutil.copytree(finished / "pair", pair)
    settings = yaml.safe_load(config_path.read_text())
    settings["pair"] = {
        "drafter": str(pair / "drafter"), "verifier": str(pair / "verifier"), "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    fitted(path, out)
    weights = pair / "verifier" / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    reused, said = fitted(path, out)
    assert not any(reused[name] for name in ("pair", "traces", "fit"))
    assert "pair.verifier" in said[0]


def test_a_run_of_an_earlier_release_is_done_again_and_says_so(tmp_path):
    def work(_):
        (tmp_path / "out").write_text("x")

    stage = Stage("s", "t", {}, (), ("out",), work)
    StageRunner(tmp_path).run([stage])
    marker = tmp_path / "stages" / "s.json"
    old = json.loads(marker.read_text())
    del old["source"]
    marker.write_text(json.dumps({**old, "key": provenance.hash_of(["0.1", "s", {}, {}])}))
    said: list[str] = []
    record = StageRunner(tmp_path, explain=said.append).run([stage])["s"]
    assert not record.reused
    assert "an earlier release finished it, without a record" in said[0]


@pytest.mark.parametrize("content", ["one", "two"])
def test_inputs_count_by_content(tmp_path, content):
    source = tmp_path / "input"
    source.write_text("one")
    calls: list[str] = []

    def stage():
        return Stage("s", "t", {}, (), (), lambda _: calls.append("x"), inputs={"data": source, "none": None})

    StageRunner(tmp_path / "run").run([stage()])
    source.write_text(content)
    StageRunner(tmp_path / "run").run([stage()])
    assert len(calls) == (1 if content == "one" else 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"heads": {"candidates": {"gap": {"hidden": 16}}}},
            "heads.candidates.gap.hidden: 16 is no list of whole numbers",
        ),
        (
            {"heads": {"candidates": {"gap": {"hidden": [0]}}}},
            "heads.candidates.gap.hidden: [0] is out of range",
        ),
        (
            {"heads": {"candidates": {"gap": {"lr": "fast"}}}},
            "heads.candidates.gap.lr: 'fast' is no finite number",
        ),
        ({"heads": {"candidates": {"gap": {"lr": -1}}}}, "heads.candidates.gap.lr: -1 is out of range"),
        (
            {"heads": {"candidates": {"gap": {"epochs": 1.5}}}},
            "heads.candidates.gap.epochs: 1.5 is no whole number",
        ),
        (
            {"heads": {"candidates": {"gap": {"epochs": True}}}},
            "heads.candidates.gap.epochs: True is no whole",
        ),
        (
            {"heads": {"candidates": {"gap": {"head": "gab"}}}},
            "heads.candidates.gap.head: 'gab' is unknown; use",
        ),
        ({"heads": {"candidates": {"gap": {"features": ["drafter_mx"]}}}}, "heads.candidates.gap: "),
        ({"heads": {"candidates": {"gap": {"alphas": [0.3, 0.1]}}}}, "heads.candidates.gap: alpha grid"),
        (
            {"heads": {"candidates": {"gap": {"truth": "oracle"}}}},
            "heads.candidates.gap.truth: 'oracle' is unknown",
        ),
        ({"heads": {"candidates": {"gap": {"body": "mlpp"}}}}, "heads.candidates.gap.body"),
        ({"heads": {"candidates": {"gap": [1]}}}, "heads.candidates"),
        ({"traces": {"temperature": -1}}, "traces: temperature=-1"),
        ({"traces": {"prefixes": "reverence"}}, "traces: prefixes='reverence'"),
        ({"decode": {"batch_size": 0}}, "decode: batch_size is 0"),
        ({"decode": {"metrics": ["rogue1"]}}, "decode: metric is 'rogue1'"),
        ({"frontier": {"temperatures": [-0.5]}}, "frontier: temperature is -0.5"),
        ({"frontier": {"temperatures": [0], "metric": "blue"}}, "frontier: metric is 'blue'"),
        ({"rules": ["opt", "token_v3", "chou"]}, "rules: "),
        ({"seed": -1}, "seed=-1"),
        ({"bootstrap": -5}, "bootstrap=-5"),
        ({"on_policy": 0}, "on_policy=0"),
    ],
)
def test_every_value_is_checked_before_any_work(config_path, tmp_path, capsys, change, said):
    settings = {**yaml.safe_load(config_path.read_text()), **change}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["run", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()
