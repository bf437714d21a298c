"""collect into a folder that holds traces: shards of other models, heads or prompts never lie in one folder."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deferral_train import cli, provenance
from deferral_train.collecting import CollectConfig, collect
from deferral_train.errors import InputError
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.heads import GapHead
from deferral_train.pairs.prompts import write_prompts
from deferral_train.traces import open_traces

from .conftest import make_prompts, tiny, tiny_pair

SETTINGS = {
    "prefixes": "cascade",
    "max_new_tokens": 4,
    "chunk_prompts": 2,
    "log_top_k": 2,
    "temperature": 0.0,
}
PROMPTS = make_prompts(6)


def head(folder: Path, seed: int, alpha: float = 0.1) -> Path:
    torch.manual_seed(seed)
    made = GapHead(["drafter_max", "verifier_max"], hidden=[4])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    made.metadata = {"alpha": alpha}
    return made.save_pretrained(folder)


def run(out: Path, folder: Path, pair, **more) -> None:
    config = CollectConfig(**SETTINGS, rule=f"learned:head={folder}")
    collect(config, out, progress=False, models=pair, prompts=PROMPTS, **more)


def shards(out: Path) -> dict[str, str]:
    return {path.name: provenance.sha256(path) for path in out.glob("shard-*.arrow")}


@pytest.mark.parametrize("change", ["weights", "alpha"])
def test_a_head_exported_anew_does_not_go_on_with_the_old_ones_shards(tmp_path, change):
    pair = tiny_pair("llama")
    head(tmp_path / "head", 0)
    run(tmp_path / "out", tmp_path / "head", pair)
    before = shards(tmp_path / "out")
    run(tmp_path / "out", tmp_path / "head", pair)
    assert shards(tmp_path / "out") == before
    (tmp_path / "out" / "shard-00002.arrow").unlink()  # as if it had been cut short
    head(tmp_path / "head", 1 if change == "weights" else 0, 0.1 if change == "weights" else 0.7)
    with pytest.raises(InputError, match=r"settings\.contents\.rule.*another --out, or --fresh"):
        run(tmp_path / "out", tmp_path / "head", pair)
    assert len(shards(tmp_path / "out")) == 2
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(tmp_path / "out", tmp_path / "head", pair, existing="replace")
    assert len(shards(tmp_path / "out")) == 3
    assert len(open_traces(tmp_path / "out", verify=True).prompt_ids) == len(PROMPTS)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_model_changed_in_memory_is_seen(tmp_path):
    head(tmp_path / "head", 0)
    pair = tiny_pair("llama")
    run(tmp_path / "out", tmp_path / "head", pair)
    with torch.no_grad():
        list(pair.verifier.parameters())[2].view(-1)[1] += 1
    with pytest.raises(InputError, match=r"settings\.contents\.verifier"):
        run(tmp_path / "out", tmp_path / "head", pair)


def test_the_command_sees_models_trained_on_in_their_folder_and_starts_over_when_told(tmp_path, capsys):
    drafter, verifier = tiny.save_tiny_pair("llama", tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    out = tmp_path / "out"
    words = [
        "collect", "--drafter", str(drafter), "--verifier", str(verifier), "--prompts", str(tmp_path / "prompts.jsonl"),
        "--out", str(out), "--device", "cpu", "--progress", "false",
    ]  # fmt: skip
    assert cli.main(words) == 0
    before = shards(out)
    assert cli.main(words) == 0
    path = Path(verifier) / "model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[tensors[name].numel() // 2 + 3] += 1.0  # one number of the largest tensor
    save_file(tensors, path, metadata={"format": "pt"})
    assert cli.main(words) == 2
    assert "settings.contents.verifier" in capsys.readouterr().err
    assert shards(out) == before
    assert cli.main([*words, "--fresh"]) == 0
    assert shards(out).keys() == before.keys()


def test_a_second_collect_is_told_at_once(tmp_path):
    head(tmp_path / "head", 0)
    with (
        provenance.one_writer(tmp_path / "out", "collect"),
        pytest.raises(InputError, match="another collect is working"),
    ):
        run(tmp_path / "out", tmp_path / "head", tiny_pair("llama"))
    assert not (tmp_path / "out").exists()


def test_traces_of_an_earlier_release_are_not_gone_on_with(tmp_path):
    head(tmp_path / "head", 0)
    pair = tiny_pair("llama")
    run(tmp_path / "out", tmp_path / "head", pair)
    header = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del header["settings"]["contents"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"settings\.contents: None ->"):
        run(tmp_path / "out", tmp_path / "head", pair)
    assert len(open_traces(tmp_path / "out")) > 0


LABELS = {
    "prefixes": "verifier",
    "labels": "sequence",
    "max_new_tokens": 4,
    "temperature": 0.0,
    "log_top_k": 0,
}


def labelled(folder: Path, pair, prompts, metric: str) -> None:
    config = CollectConfig(**LABELS, label_metric=metric)
    collect(config, folder, progress=False, models=pair, prompts=prompts, scores=make_scorers([metric]))


def program(path: Path, score: float) -> str:
    path.write_text(
        "import json, sys\nfor line in sys.stdin:\n"
        f"    print(json.dumps({{'score': {score} if 'w1' in json.loads(line)['text'] else 0.25}}), flush=True)\n"
    )
    return f"command:{sys.executable} {path} --api-key s3cretive-1"


def test_labels_of_another_program_do_not_mix_and_its_key_is_not_kept(tmp_path):
    pair = tiny_pair("llama")
    metric = program(tmp_path / "score.py", 0.5)
    labelled(tmp_path / "out", pair, PROMPTS, metric)
    labelled(tmp_path / "out", pair, PROMPTS, metric)
    assert "s3cretive" not in (tmp_path / "out" / "manifest.json").read_text()
    program(tmp_path / "score.py", 0.75)
    with pytest.raises(InputError, match=r"settings\.contents\.metrics"):
        labelled(tmp_path / "out", pair, PROMPTS, metric)


def test_labels_against_other_references_do_not_mix(tmp_path):
    pair = tiny_pair("llama")
    labelled(tmp_path / "out", pair, PROMPTS, "chrf")
    spaced = [replace(prompt, reference=f" {prompt.reference}") for prompt in PROMPTS]  # the same tokens
    with pytest.raises(InputError, match=r"settings\.contents\.references"):
        labelled(tmp_path / "out", pair, spaced, "chrf")
