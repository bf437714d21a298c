"""Models with few positions: what fits is collected to the last position, what does not is left out by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deferral_train.collecting import CollectConfig, collect
from deferral_train.errors import InputError
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.positions import PositionLimits, room_of
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces import open_traces

from .conftest import tiny

ROOM = 24
IDS = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT |= {"is_decoder": True}


def config_of(kind: str) -> Any:
    if kind == "led":
        sizes = {"max_encoder_position_embeddings": ROOM, "max_decoder_position_embeddings": ROOM // 2}
        return transformers.LEDConfig(**BART, **IDS, **sizes, attention_window=8)
    if kind in ("bart", "marian", "pegasus"):
        made = {"bart": transformers.BartConfig, "marian": transformers.MarianConfig}
        return made.get(kind, transformers.PegasusConfig)(**BART, **IDS, max_position_embeddings=ROOM)
    if kind == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=ROOM, **IDS)
    if kind == "opt":
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32}
        return transformers.OPTConfig(
            **sizes, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=ROOM, **IDS
        )
    return transformers.XLMRobertaConfig(**BERT, max_position_embeddings=ROOM, type_vocab_size=1, **IDS)


def model_of(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = config_of(kind)
    auto = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    return auto.from_config(config).eval().requires_grad_(False)


def places(model: Any, prompt: int, text: int) -> bool:
    """True where a forward pass takes so many tokens."""

    def ids(n: int) -> torch.Tensor:
        return torch.full((1, n), 5)

    try:
        if model.config.is_encoder_decoder:
            model(input_ids=ids(prompt), decoder_input_ids=ids(text))
        else:
            model(input_ids=ids(text))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", ["bart", "marian", "pegasus", "led", "gpt2", "opt", "xlm-roberta"])
def test_the_room_is_what_a_forward_pass_takes(kind: str) -> None:
    model = model_of(kind)
    room = room_of((model, model))
    prompt, text = room.prompt or 1, room.text or 1
    assert places(model, prompt, text)
    assert not places(model, 1, text + 1)
    if room.prompt is not None and kind != "led":  # LED pads what its encoder reads to whole windows
        assert not places(model, prompt + 1, 1)


def test_a_pair_has_the_room_of_the_smaller_and_relative_positions_set_no_bound() -> None:
    t5 = tiny.tiny_model("t5", 0)
    assert room_of((t5, t5)) == PositionLimits(None, None)
    assert room_of((t5, model_of("bart"))) == PositionLimits(ROOM, ROOM)


@pytest.mark.parametrize("prefixes", ["reference", "verifier"])
@pytest.mark.parametrize("kind", ["bart", "marian", "gpt2"])
def test_long_prompts_and_references_are_left_out_by_name(kind: str, prefixes: str, tmp_path: Path) -> None:
    pair = make_pair(model_of(kind, 1), model_of(kind), tiny.tiny_tokenizer())
    new = 4
    config = CollectConfig(
        device="cpu", prefixes=prefixes, log_top_k=4, max_new_tokens=None if prefixes == "reference" else new
    )
    room = ROOM if pair.is_encoder_decoder else ROOM - new
    prompts = [
        Prompt("fits", " ".join(["w1"] * (room - 2)), "w2 w3"),
        Prompt("long", " ".join(["w1"] * (ROOM + 5)), "w2 w3"),
        Prompt("long reference", "w1", " ".join(["w2"] * (ROOM + 5))),
    ]
    collect(config, tmp_path, progress=False, models=pair, prompts=prompts)
    manifest = open_traces(tmp_path).manifest
    skipped = dict(manifest.prompts["skipped"])
    assert "fits" in manifest.prompt_ids
    assert f"more than the limit of {ROOM if pair.is_encoder_decoder else room}" in skipped["long"] or (
        prefixes == "reference" and f"more than the limit of {ROOM - 1}" in skipped["long"]
    )
    if prefixes == "reference":
        assert f"more than the models' {ROOM} positions" in skipped["long reference"]
    else:
        assert "long reference" in manifest.prompt_ids


def test_more_new_tokens_than_there_are_positions(tmp_path: Path) -> None:
    pair = make_pair(model_of("bart", 1), model_of("bart"), tiny.tiny_tokenizer())
    config = CollectConfig(device="cpu", prefixes="verifier", max_new_tokens=ROOM + 1)
    with pytest.raises(InputError, match=f"max_new_tokens={ROOM + 1}: .* use at most {ROOM}"):
        collect(config, tmp_path, progress=False, models=pair, prompts=[Prompt("a", "w1")])
    collect(
        CollectConfig(device="cpu", prefixes="verifier", max_new_tokens=ROOM),
        tmp_path / "b", progress=False, models=pair, prompts=[Prompt("a", "w1")],
    )  # fmt: skip
