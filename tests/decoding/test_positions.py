"""Models with few positions decode to the last of them; what does not fit is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from decoding.small import IDS, SEQ2SEQ, cascade, llama, made, near, own
from tiny_models import tiny_tokenizer

from deferral_train.decoding.facts import facts_of
from deferral_train.decoding.pair import Pair
from deferral_train.errors import InputError
from deferral_train.pairs.load import make_pair

ROOM = 24
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def decoder(kind: str) -> Any:
    if kind == "gpt2":
        return made(tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=ROOM, **IDS))
    if kind == "opt":
        return made(
            tf.OPTConfig(**HEADS, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=ROOM, **IDS)
        )
    # The first positions of this family stand for padding.
    return made(tf.XLMRobertaConfig(**HEADS, is_decoder=True, max_position_embeddings=ROOM + 1, **IDS))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "xlm_roberta"])
@pytest.mark.parametrize("drafts", [1, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_text_may_fill_every_position_and_its_last_token_none(kind: str, drafts: int, rows: int) -> None:
    verifier = decoder(kind)
    assert facts_of(verifier).context == ROOM
    ids = torch.randint(4, 40, (rows, 18), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[1, :4], mask[1, :4] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"eos_token_id": None, "pad_token_id": 0}
    expected = own(verifier, inputs, max_new_tokens=ROOM - 18 + 1, **options)
    found = cascade(
        verifier, inputs, near(verifier), num_draft_tokens=drafts, max_new_tokens=ROOM - 18 + 1, **options
    )
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match=f"context of {ROOM}"):
        cascade(verifier, inputs, near(verifier), max_new_tokens=ROOM - 18 + 2, **options)


def led() -> Any:
    sizes = {
        "max_encoder_position_embeddings": ROOM,
        "max_decoder_position_embeddings": 12,
        "attention_window": 8,
    }
    config = {key: value for key, value in SEQ2SEQ.items() if key != "max_position_embeddings"}
    return made(tf.LEDConfig(**config, **sizes), tf.AutoModelForSeq2SeqLM)


def test_an_encoder_has_positions_of_its_own() -> None:
    verifier = led()
    inputs = {"input_ids": torch.arange(4, 4 + 20)[None]}
    options = {"eos_token_id": None, "pad_token_id": 0}
    expected = own(verifier, inputs, max_new_tokens=12, **options)
    assert torch.equal(cascade(verifier, inputs, near(verifier), max_new_tokens=12, **options), expected)
    with pytest.raises(InputError, match="context of 12"):
        cascade(verifier, inputs, near(verifier), max_new_tokens=13, **options)
    # generate has run the verifier's encoder before we are asked; a drafter's is ours.
    short = made(tf.BartConfig(**{**SEQ2SEQ, "max_position_embeddings": 16}), tf.AutoModelForSeq2SeqLM)
    with pytest.raises(InputError, match="20 tokens exceeds the 16 positions of the drafter's encoder"):
        cascade(verifier, inputs, short, max_new_tokens=8)


def pair_of(model: Any, drafter: Any) -> Pair:
    return Pair(make_pair(drafter, model, tiny_tokenizer()))


def test_a_pair_names_the_prompt_that_does_not_fit() -> None:
    pair = pair_of(led(), near(led()))
    words = " ".join(f"w{n % 30}" for n in range(ROOM))
    assert len(pair.generate(words, max_new_tokens=12).sequences[0]) <= 12
    with pytest.raises(
        InputError, match=rf"prompt prompt:2: 25 tokens exceed the {ROOM} positions of the drafter's"
    ):
        pair.generate([words, words + " w1"], max_new_tokens=8)
    with pytest.raises(InputError, match="room for 13 more exceed the drafter's context of 12"):
        pair.generate(words, max_new_tokens=13)
    small = pair_of(decoder("gpt2"), near(decoder("gpt2")))
    assert len(small.generate(" ".join(words.split()[:20]), max_new_tokens=5).sequences[0]) <= 5
    with pytest.raises(
        InputError, match=f"20 tokens and room for 6 more exceed the drafter's context of {ROOM}"
    ):
        small.generate(" ".join(words.split()[:20]), max_new_tokens=6)


def test_a_drafter_with_fewer_positions_is_named() -> None:
    with pytest.raises(InputError, match=f"exceed the drafter's context of {ROOM}"):
        cascade(llama(), {"input_ids": torch.arange(4, 24)[None]}, decoder("gpt2"), max_new_tokens=8)
