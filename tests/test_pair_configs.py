"""The configs of common pairs: read as `run` reads them, built without weights, memory as they state it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer

from benchmarks.pair_memory import PAIRS, SHAPES, meta_model, parameter_count, statement
from deferral_train.decoding import Pair
from deferral_train.pairs.load import make_pair
from deferral_train.pipeline.config import read_config

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "pairs"


def test_every_pair_has_a_config():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_config_names_the_pair_and_states_memory_time_and_vocabulary(name):
    path = FOLDER / f"{name}.yaml"
    config, text = read_config(path), path.read_text(encoding="utf-8")
    assert (config.pair.drafter, config.pair.verifier) == PAIRS[name]
    assert f"# Memory:  {statement(name)}\n" in text
    assert re.search(r"^# Time:    not measured\.$", text, re.MULTILINE)
    shape = SHAPES[config.pair.verifier]
    assert f"{shape.config.vocab_size:,} columns" in text
    assert shape.tokens == shape.config.vocab_size or f"{shape.tokens:,} of them tokens" in text


@pytest.mark.parametrize("name", SHAPES)
def test_dimensions_give_the_published_parameter_count(name):
    model = meta_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameter_count(model) == SHAPES[name].parameters


@pytest.mark.parametrize("name", PAIRS)
def test_the_models_make_a_pair_whose_padding_is_left_out(name):
    drafter, verifier = (meta_model(one) for one in PAIRS[name])
    tokens = SHAPES[PAIRS[name][1]].tokens
    pair = make_pair(drafter, verifier, FakeTokenizer(tokens))
    assert pair.vocab_size == tokens <= verifier.config.vocab_size


class FakeTokenizer(SimpleNamespace):
    """As long as the real one; the hub's tokenizers are not here."""

    def __init__(self, length: int) -> None:
        super().__init__(length=length, eos_token_id=1, pad_token_id=0)

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("kind", ["t5", "gemma2", "qwen3", "llama"])
def test_models_of_unlike_padding_decode_tokens_only(kind):
    """Drafter and verifier padded to different sizes, with padding columns that would win every argmax."""
    tokenizer = tiny_tokenizer()
    drafter, verifier = (tiny_model(kind, seed, vocab_size=size) for seed, size in ((0, 48), (1, 64)))
    with torch.no_grad():
        for model in (drafter, verifier):
            rows = model.get_output_embeddings().weight
            rows[len(tokenizer) :] = 50 * rows[: len(rows) - len(tokenizer)]
    pair = Pair(make_pair(drafter, verifier, tokenizer))
    for rule in ("lossless", "opt", "drafter_only"):
        result = pair.generate(["w1 w2 w3", "w4"], rule=rule, max_new_tokens=8)
        assert max(max(row) for row in result.sequences) < len(tokenizer)


def test_a_t5_with_its_own_output_matrix_keeps_it(tmp_path):
    """transformers builds every T5 tied; FLAN-T5's checkpoints are not, and must load as they are."""
    from transformers import AutoModelForSeq2SeqLM

    tiny_model("t5", 0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    own = torch.randn_like(tensors["shared.weight"])
    save_file({**tensors, "lm_head.weight": own}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, own)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert not model.config.scale_decoder_outputs
