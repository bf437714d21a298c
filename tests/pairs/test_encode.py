"""Prompts to ids: templates, ends, and what is left out and why."""

import pytest
from tiny_models import tiny_tokenizer

from deferral_train.errors import InputError
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.prompts import Prompt

PROMPTS = [
    Prompt("a", "w1 w2", "w3"),
    Prompt("b", "w1 w2 w3 w4", "w5 w6 w7"),
    Prompt("c", " ", "w1"),
    Prompt("d", "w1", ""),
]
TEMPLATE = (
    "<s> {% for m in messages %}w30 {{ m.content }} w31 {% endfor %}"
    "{% if add_generation_prompt %}w32{% endif %}"
)


def test_decoder_only_text_goes_on():
    encoded = encode_prompts(tiny_tokenizer(), PROMPTS)
    assert [(e.id, e.input_ids, e.reference_ids) for e in encoded.kept] == [
        ("a", [5, 6], [7]),
        ("b", [5, 6, 7, 8], [9, 10, 11]),
        ("d", [5], []),
    ]
    assert [str(notice) for notice in encoded.skipped] == ["prompt c: empty prompt"]


def test_limits_are_reported_by_id():
    encoded = encode_prompts(
        tiny_tokenizer(), PROMPTS, max_prompt_tokens=3, max_reference_tokens=2, require_reference=True
    )
    assert [e.id for e in encoded.kept] == ["a"]
    reasons = {notice.id: notice.reason for notice in encoded.skipped}
    assert reasons == {"b": "4 tokens, more than the limit of 3", "c": "empty prompt", "d": "empty reference"}
    cut = encode_prompts(tiny_tokenizer(), PROMPTS, max_reference_tokens=2)
    assert [notice.id for notice in cut.cut] == ["b"]
    assert cut.kept[1].reference_ids == [9, 10]
    assert (
        encode_prompts(tiny_tokenizer(), [Prompt("e", "w1")], require_reference=True).skipped[0].reason
        == "no reference"
    )


def test_encoder_decoder_references_end():
    encoded = encode_prompts(tiny_tokenizer(), PROMPTS[:1], is_encoder_decoder=True)
    assert encoded.kept[0].reference_ids == [7, 1]


def test_chat_template_is_used_where_there_is_one():
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="no chat template"):
        encode_prompts(tokenizer, PROMPTS[:1], chat="on")
    tokenizer.chat_template = TEMPLATE
    kept = encode_prompts(tokenizer, PROMPTS[:1]).kept[0]
    assert kept.input_ids == [2, 34, 5, 6, 35, 36]
    assert kept.reference_ids == [7, 1]
    assert encode_prompts(tokenizer, PROMPTS[:1], chat="off").kept[0].input_ids == [5, 6]
    with pytest.raises(InputError, match="chat='maybe'"):
        encode_prompts(tokenizer, PROMPTS, chat="maybe")


def test_a_tokenizer_that_closes_texts_does_not_end_the_prompt():
    from deferral_train.pairs.scratch.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some text to learn from"] * 3, 300, close_texts=True)
    one = encode_prompts(tokenizer, [Prompt("a", "some text", "more")]).kept[0]
    both = encode_prompts(tokenizer, [Prompt("a", "some text", "more")], is_encoder_decoder=True).kept[0]
    assert both.input_ids == [*one.input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(one.input_ids) == "some text"


def test_shared_pair_tokenizer(t5_pair):
    from deferral_train.pairs.load import load_tokenizer

    tokenizer = load_tokenizer(t5_pair / "verifier")
    encoded = encode_prompts(
        tokenizer, [Prompt("a", "A man sleeps.", "Ein Mann schläft.")], is_encoder_decoder=True
    ).kept[0]
    assert encoded.input_ids[-1] == encoded.reference_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.reference_ids, skip_special_tokens=True) == "Ein Mann schläft."


def test_a_template_that_can_ask_for_thoughts_is_told_not_to():
    """References follow the prompt at once, as answers without thoughts do."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}"
        "{% if enable_thinking is defined and enable_thinking is false %} w9{% endif %}"
    )
    ids = encode_prompts(tokenizer, [Prompt("a", "w1 w2", "w3")]).kept[0].input_ids
    assert tokenizer.decode(ids) == "w1 w2 w9"
