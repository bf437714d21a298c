"""Passes go the way of the model's own ``generate``: positions, switches of the cache, arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from decoding.small import IDS, LEFT, LLM, ONE, RIGHT, SEQ2SEQ, TWO, cascade, llama, made, near, own

from deferral_train.decoding.facts import facts_of
from deferral_train.errors import InputError
from deferral_train.rules import make_rule

BERT = {key: value for key, value in LLM.items() if key != "num_key_value_heads"} | {"is_decoder": True}
SWITCH = 16


def phi3(**options: Any) -> Any:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
        "long_factor": [4.0 + n for n in range(8)], "original_max_position_embeddings": SWITCH,
        "partial_rotary_factor": 1.0,
    }  # fmt: skip
    config = {**LLM, "original_max_position_embeddings": SWITCH, "rope_parameters": rope, **options}
    return made(tf.Phi3Config(**config))


@pytest.mark.parametrize("prompt", [7, 15, 16, 17, 18])
@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_longrope_is_crossed_as_generate_crosses_it(prompt: int, drafts: int) -> None:
    verifier, inputs = phi3(), {"input_ids": torch.arange(5, 5 + prompt)[None]}
    options = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    expected = own(verifier, inputs, **options)
    for drafter in (verifier, near(verifier), phi3(num_hidden_layers=1), llama()):
        found = cascade(verifier, inputs, drafter, num_draft_tokens=drafts, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("execution", ["token", "lazy", "sequence"])
def test_longrope_without_blocks(execution: str) -> None:
    verifier = phi3()
    options = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    rule = make_rule("chow", alpha=0.0)
    found = cascade(verifier, ONE, near(verifier), rule=rule, execution=execution, **options)
    assert torch.equal(found, own(verifier, ONE, **options))


def test_longrope_in_a_batch() -> None:
    verifier = phi3()
    short = {"max_new_tokens": SWITCH - 7}
    assert torch.equal(cascade(verifier, LEFT, near(verifier), **short), own(verifier, LEFT, **short))
    with pytest.raises(
        InputError, match="longrope changes its factors for a whole batch; decode one unpadded row"
    ):
        cascade(verifier, TWO, verifier, max_new_tokens=24)


HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "xlm_roberta": tf.XLMRobertaConfig(**BERT),
    "roberta": tf.RobertaConfig(**BERT),
    "bert": tf.BertConfig(**BERT),
    "opt": tf.OPTConfig(hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, **HEADS, **IDS),
    "bloom": tf.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **IDS),
    "mpt": tf.MptConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=128, use_cache=True, **IDS),
    "phi3": tf.Phi3Config(**LLM),
}


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("inputs", [ONE, TWO, LEFT], ids=["one", "two", "ragged"])
def test_positions_are_the_model_s_own(kind: str, inputs: dict[str, torch.Tensor]) -> None:
    verifier = made(MODELS[kind])
    assert torch.equal(cascade(verifier, inputs, near(verifier)), own(verifier, inputs))


@pytest.mark.parametrize("config", [tf.BartConfig, tf.MarianConfig, tf.PegasusConfig, tf.M2M100Config])
@pytest.mark.parametrize("inputs", [ONE, RIGHT], ids=["one", "ragged"])
def test_decoders_with_absolute_positions(config: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Their rows cannot sit at offsets of their own: in a batch they advance together."""
    verifier = made(config(**SEQ2SEQ), tf.AutoModelForSeq2SeqLM)
    for drafter in (verifier, near(verifier)):
        assert torch.equal(cascade(verifier, inputs, drafter), own(verifier, inputs))


@pytest.mark.parametrize("start", [3, 40])
def test_position_ids_of_the_caller_are_read(start: int) -> None:
    verifier = llama()
    inputs = {**ONE, "position_ids": start + 2 * torch.arange(7)[None]}
    expected = own(verifier, inputs)
    assert not torch.equal(expected, own(verifier, ONE))
    assert torch.equal(cascade(verifier, inputs, llama(1)), expected)
    alike = cascade(verifier, inputs, verifier, return_dict_in_generate=True)
    assert torch.equal(alike.sequences, expected)
    assert int(alike.stats.rejected.sum()) == 0  # the drafter was given them too


@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_are_asked_what_they_are() -> None:
    verifier = llama()
    for drafter in (
        torch.compile(llama(), backend="eager"),
        torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}),
    ):
        assert facts_of(drafter).takes == facts_of(verifier).takes
        assert facts_of(drafter).vocab_size == 40
        assert torch.equal(cascade(verifier, LEFT, drafter), own(verifier, LEFT))
    eight = torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear})
    # It scales the activations of each pass by their own range: texts are equal where passes are of one width.
    assert torch.equal(cascade(eight, ONE, verifier, rule="verifier_only"), own(eight, ONE))
    cascade(eight, ONE, verifier)


def test_an_embedding_that_was_resized_is_noticed() -> None:
    verifier, drafter = llama(), llama(1)
    cascade(verifier, ONE, drafter)
    for model in (verifier, drafter):
        model.resize_token_embeddings(48)
    assert torch.equal(cascade(verifier, ONE, drafter), own(verifier, ONE))
    drafter.resize_token_embeddings(40)
    with pytest.raises(InputError, match="vocabularies differ: drafter 40, verifier 48"):
        cascade(verifier, ONE, drafter)


@pytest.mark.parametrize("kind", ["m2m100", "fsmt"])
@pytest.mark.parametrize("inputs", [ONE, RIGHT], ids=["one", "ragged"])
@pytest.mark.parametrize("execution", ["speculative", "lazy"])
def test_a_padding_id_within_a_text_moves_no_position(
    kind: str, inputs: dict[str, torch.Tensor], execution: str
) -> None:
    if kind == "fsmt":
        sizes = {"src_vocab_size": 40, "tgt_vocab_size": 40, "langs": ["en", "de"]}
        config: Any = tf.FSMTConfig(**{**SEQ2SEQ, "max_position_embeddings": 128}, **sizes)
    else:
        config = tf.M2M100Config(**SEQ2SEQ)
    verifier = made(config, tf.AutoModelForSeq2SeqLM)
    options = {"eos_token_id": None, "pad_token_id": 3, "sequence_bias": {(0,): 3.0}, "num_beams": 1}
    options["no_repeat_ngram_size"] = 2
    expected = own(verifier, inputs, **options)
    assert 2 < int((expected[0] == 0).sum()) < 12  # now and then the verifier writes the id that it pads with
    options |= {"rule": make_rule("chow", alpha=0.0), "execution": execution}
    for drafter in (near(verifier), verifier):
        assert torch.equal(cascade(verifier, inputs, drafter, **options), expected)
