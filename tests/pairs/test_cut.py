"""A drafter cut from an existing verifier and distilled: weights, resuming, what cannot be meant."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_model

from deferral_train.errors import InputError
from deferral_train.pairs.load import load_models
from deferral_train.pairs.scratch import train
from deferral_train.pairs.scratch.cut import cut, layers_of, open_verifier
from deferral_train.pairs.scratch.progress import TrainingBars
from deferral_train.pairs.scratch.train import train_pair
from deferral_train.pairs.scratch.train_config import ModelSize, PairConfig, PairText, Schedule
from deferral_train.pipeline.config import PairSection
from deferral_train.pipeline.contents import pair_inputs

SENTENCES = [
    "the red fox runs over the hill",
    "a blue bird sings in the tree",
    "two men walk along the river",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"{SENTENCES[i % 3]} {i % 7}\n" for i in range(8000)))
    return path


@pytest.fixture(scope="module")
def verifier(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of five layers that has learned the sentences."""
    config = PairConfig(
        text=PairText(files=(str(text),)), vocab_size=320, context=32,
        drafter=ModelSize(1, 16, 2, 32), verifier=ModelSize(5, 32, 2, 64),
        drafter_schedule=Schedule(1, 2), verifier_schedule=Schedule(120, 4, 3e-3, warmup=5),
    )  # fmt: skip
    return train_pair(config, tmp_path_factory.mktemp("scratch")).verifier


def config_of(text: Path, verifier: Path, **changes: Any) -> PairConfig:
    config = PairConfig(
        text=PairText(files=(str(text),)), context=32, from_verifier=str(verifier), kept_layers=(0, 1, -1),
        drafter_schedule=Schedule(30, 4, 3e-4, embedding_rate=1.0, warmup=2, distil=1.0), checkpoint_seconds=0.0,
    )  # fmt: skip
    return replace(config, **changes)


def test_kept_layers_are_the_verifiers_own(verifier: Path) -> None:
    whole = open_verifier(verifier, torch.float32)
    part = cut(whole, (0, 3, -1))
    assert part.config.num_hidden_layers == len(part.model.layers) == 3
    assert whole.config.num_hidden_layers == 5
    for place, number in enumerate((0, 3, 4)):
        for name, value in whole.model.layers[number].state_dict().items():
            assert torch.equal(value, part.model.layers[place].state_dict()[name])
    assert torch.equal(whole.model.norm.weight, part.model.norm.weight)
    assert torch.equal(whole.get_output_embeddings().weight, part.get_output_embeddings().weight)
    # By hand: the kept layers one after the other.
    ids = torch.tensor([[1, 5, 9, 4]])
    hidden = whole.model.embed_tokens(ids)
    rope = whole.model.rotary_emb(hidden, torch.arange(4)[None])
    mask = torch.full((4, 4), -torch.inf).triu(1)[None, None]
    for number in (0, 3, 4):
        hidden = whole.model.layers[number](hidden, attention_mask=mask, position_embeddings=rope)
    torch.testing.assert_close(
        part(ids).logits, whole.lm_head(whole.model.norm(hidden)), rtol=1e-4, atol=1e-5
    )


def test_the_drafter_is_drawn_to_the_verifier_which_stays_as_it_is(
    text: Path, verifier: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(name: str, steps: int) -> Any:
        return lambda step, tokens, loss: seen.append((name, steps, step))

    result = train_pair(config_of(text, verifier), tmp_path / "pair", progress)
    assert {one[:2] for one in seen} == {("drafter", 30)}
    assert [one[2] for one in seen] == list(range(1, 31))
    given, ours = (load_file(folder / "model.safetensors") for folder in (verifier, result.verifier))
    assert given.keys() == ours.keys()
    assert all(torch.equal(given[name], ours[name]) for name in given)
    pair = load_models(result.drafter, result.verifier, device="cpu", dtype="float32")
    assert pair.drafter.config.num_hidden_layers == 3
    start = cut(open_verifier(verifier, torch.float32), (0, 1, -1))
    ids = torch.tensor([pair.tokenizer(" ".join(SENTENCES))["input_ids"]])

    def divergence(model: Any) -> float:
        with torch.no_grad():
            p, q = (each(ids).logits.log_softmax(-1) for each in (pair.verifier, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(pair.drafter) < 0.5 * divergence(start)
    record = json.loads((tmp_path / "pair" / "pair.json").read_text())
    assert record["losses"].keys() == {"drafter"}
    assert record["config"]["kept_layers"] == [0, 1, -1]
    assert train_pair(config_of(text, verifier), tmp_path / "pair").reused
    with pytest.raises(InputError, match="another configuration"):
        train_pair(config_of(text, verifier, kept_layers=(0, -1)), tmp_path / "pair")


def test_broken_off_and_taken_up_it_ends_with_the_same_bits(
    text: Path, verifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_pair(config_of(text, verifier), tmp_path / "whole")

    class BreakError(Exception):
        pass

    def progress(name: str, steps: int) -> Any:
        def report(step: int, tokens: int, loss: float) -> None:
            if step == 17:
                raise BreakError

        return report

    with pytest.raises(BreakError):
        train_pair(config_of(text, verifier), tmp_path / "broken", progress)
    assert (tmp_path / "broken" / "work" / "drafter.pt").is_file()
    done = []
    counting = train.optimise
    monkeypatch.setattr(train, "optimise", lambda *given: done.append(1) or counting(*given))
    again = train_pair(config_of(text, verifier), tmp_path / "broken")
    assert len(done) == 1
    first, second = (load_file(each.drafter / "model.safetensors") for each in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((), "layers 0 to 4"),
        ((0, 5), "layers 0 to 4"),
        ((0, -6), "layers 0 to 4"),
        ((1, 0), "in the verifier's order"),
        ((0, 4, -1), "name each layer once"),
        ((0, 1, 2, 3, 4), "fewer than its 5"),
    ],
)
def test_layers_that_cannot_be_kept(kept: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layers_of(kept, 5)


def test_what_cannot_be_cut(text: Path, verifier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"drafter_schedule\.distil above 0"):
        config_of(text, verifier, drafter_schedule=Schedule(3, 2))
    with pytest.raises(InputError, match="leave kind at llama"):
        config_of(text, verifier, kind="t5")
    with pytest.raises(InputError, match=r"from_verifier: .*nothing is not a folder"):
        open_verifier(tmp_path / "nothing")
    tiny_model("t5", 0).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="is an encoder-decoder"):
        open_verifier(tmp_path / "t5")


def test_half_precision_stays_as_it_is_stored(verifier: Path, tmp_path: Path) -> None:
    load_models(verifier, verifier, device="cpu").verifier.bfloat16().save_pretrained(tmp_path / "half")
    assert open_verifier(tmp_path / "half").dtype == torch.bfloat16
    assert open_verifier(tmp_path / "half", "float32").dtype == torch.float32


def test_a_gguf_file_becomes_a_verifier_of_plain_weights(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tiny_model("llama", 5)
    path = write_gguf(model, tmp_path / "given.gguf")
    lines = ["".join("abcdefghijkl"[(n * k) % 12] for k in range(1, 30)) for n in range(1, 1500)]
    (tmp_path / "letters.txt").write_text("\n".join(lines))
    config = config_of(tmp_path / "letters.txt", path, kept_layers=(0,))
    told: list[str] = []
    done = train_pair(config, tmp_path / "pair", say=told.append)
    assert any("timing the passes" in line for line in told)
    pair = load_models(done.drafter, done.verifier, device="cpu")
    assert "quantization_config" not in json.loads((done.verifier / "config.json").read_text())
    ids = torch.tensor([[5, 9, 12, 7]])
    with torch.no_grad():
        torch.testing.assert_close(pair.verifier(ids).logits, model(ids).logits)
    assert pair.tokenizer("abcdz")["input_ids"] == [30, 31, 29]
    assert len(pair.drafter.model.layers) == 1
    assert pair_inputs(PairSection(train=config))["pair.train.from_verifier"] == str(path)


def test_lines_in_a_pipe_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr("deferral_train.pairs.scratch.progress.time.monotonic", lambda: float(next(clock)))
    written = io.StringIO()
    with TrainingBars(Console(file=written)) as bars:
        report = bars("drafter", 30)
        for step in (11, 12, 30):  # continues at step 11
            report(step, 100, 2.0)
    lines = written.getvalue().splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["25 min left", "24 min left", "loss 2.000"]
