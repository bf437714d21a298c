"""decode into a folder that holds outputs: taken up only where models, rules, stop rule and settings are the same."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decoding.helpers import pair_of

from deferral_train import provenance
from deferral_train.decoding import DecodeConfig, Pair, Settings
from deferral_train.decoding.decode import decode
from deferral_train.decoding.outputs import read_lines
from deferral_train.decoding.stopping import HeadStop
from deferral_train.errors import InputError
from deferral_train.heads.gap import GapHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt

PROMPTS = [Prompt(f"p{i}", f"w{i} w{i + 3} w7", "w1") for i in range(4)]
CONFIG = DecodeConfig(Settings(batch_size=2, max_new_tokens=6))


@pytest.fixture(scope="module")
def models():
    return pair_of("llama")


def paired(models, change=lambda drafter, verifier: None, dtype=None) -> Pair:
    drafter, verifier, tokenizer = models
    drafter, verifier = copy.deepcopy(drafter), copy.deepcopy(verifier)
    change(drafter, verifier)
    if dtype is not None:
        drafter, verifier = drafter.to(dtype), verifier.to(dtype)
    return Pair(make_pair(drafter, verifier, tokenizer))


@pytest.fixture
def done(models, tmp_path) -> Path:
    decode(paired(models), PROMPTS, ["lossless"], CONFIG, tmp_path)
    return tmp_path


def untouched(folder: Path) -> dict[str, str]:
    return {path.name: provenance.sha256(path) for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_same_call_takes_it_up(models, done):
    before = (done / "batches.jsonl").read_bytes()
    decode(paired(models), PROMPTS, ["lossless"], CONFIG, done)
    assert (done / "batches.jsonl").read_bytes() == before


def one_weight(drafter, verifier):
    with torch.no_grad():
        list(verifier.parameters())[3].view(-1)[1] += 1.0


def one_drafter_weight(drafter, verifier):
    with torch.no_grad():
        next(iter(drafter.parameters())).view(-1)[-1] += 1.0


def other_generation(drafter, verifier):
    verifier.generation_config.repetition_penalty = 1.3


@pytest.mark.parametrize(
    ("change", "dtype", "said"),
    [
        (one_weight, None, "models.verifier.weights"),
        (one_drafter_weight, None, "models.drafter.weights"),
        (other_generation, None, "models.verifier.generation"),
        (lambda *_: None, torch.bfloat16, "conditions.dtype"),
    ],
)
def test_other_models_in_memory_are_refused_and_nothing_is_lost(models, done, change, dtype, said):
    before = untouched(done)
    with pytest.raises(InputError, match=r"another folder, or --fresh to start over") as caught:
        decode(paired(models, change, dtype), PROMPTS, ["lossless"], CONFIG, done)
    assert said in str(caught.value)
    assert untouched(done) == before
    decode(paired(models, change, dtype), PROMPTS, ["lossless"], CONFIG, done, fresh=True)
    told = json.loads((done / "summary.json").read_text())["conditions"]["dtype"]["verifier"]
    assert told == ("float32" if dtype is None else "bfloat16")


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.5}, {"bonus": "exact"}, {"max_new_tokens": 5}, {"seed": 1}]
)
def test_other_settings_are_refused(models, done, changes):
    config = replace(CONFIG, settings=replace(CONFIG.settings, **changes))
    with pytest.raises(InputError, match=f"other .*settings.*{next(iter(changes))}"):
        decode(paired(models), PROMPTS, ["lossless"], config, done)


def head(seed: int, stage: str = "draft") -> GapHead:
    torch.manual_seed(seed)
    made = GapHead(
        ("drafter_max",) if stage == "draft" else ("drafter_max", "verifier_max"), stage=stage, hidden=(4,)
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.eval().requires_grad_(False)


def test_another_stop_heads_weights_are_refused(models, tmp_path):
    def config(seed):
        stop = HeadStop(head(seed), alpha=0.1, threshold=0.5)
        return replace(CONFIG, settings=replace(CONFIG.settings, stop=stop))

    decode(paired(models), PROMPTS, ["lossless"], config(0), tmp_path)
    decode(paired(models), PROMPTS, ["lossless"], config(0), tmp_path)
    with pytest.raises(InputError, match=r"settings\.stop\.head\.weights"):
        decode(paired(models), PROMPTS, ["lossless"], config(1), tmp_path)


def test_another_heads_weights_under_the_same_label_are_refused(models, tmp_path):
    def rules(seed):
        return {"mine": learned_rule(head(seed, "verify"), alpha=0.1)}

    decode(paired(models), PROMPTS, rules(0), CONFIG, tmp_path)
    with pytest.raises(InputError, match=r"rules\.mine\.head\.weights"):
        decode(paired(models), PROMPTS, rules(1), CONFIG, tmp_path)


def test_outputs_of_an_earlier_release_are_not_silently_taken(models, done):
    record = json.loads((done / "run.json").read_text())
    for name in ("models", "conditions", "prompts_planned", "tokenizer"):
        del record[name]
    record["rules"] = {"lossless": "Lossless()"}
    (done / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="other conditions, models"):
        decode(paired(models), PROMPTS, ["lossless"], CONFIG, done)
    (done / "run.json").unlink()
    with pytest.raises(InputError, match="does not record what it was made from"):
        decode(paired(models), PROMPTS, ["lossless"], CONFIG, done)


def test_a_second_decode_in_the_folder_is_told_at_once(models, done):
    before = untouched(done)
    with (
        provenance.one_writer(done, "decode"),
        pytest.raises(InputError, match="another decode is working"),
    ):
        decode(paired(models), PROMPTS, ["lossless"], CONFIG, done)
    assert untouched(done) == before
    assert len(list(read_lines(done / "outputs.jsonl"))) == len(PROMPTS)


def test_rows_that_were_altered_are_decoded_again(models, done):
    path = done / "outputs.jsonl"
    before = path.read_bytes()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"] = rows[0]["reference"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    decode(paired(models), PROMPTS, ["lossless"], CONFIG, done)
    assert sorted(path.read_bytes().splitlines()) == sorted(before.splitlines())
