"""A byte-level BPE tokenizer trained on the pair's own texts; UTF-8 text comes back unchanged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PAD, EOS = "<pad>", "</s>"
# A question as a pair that was trained on answers has read it: as it is. Having a template at all is what says that
# a reference is an answer with an end, and no text that goes on.
QUESTION = "{{ messages[-1]['content'] }}"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, close_texts: bool, chat_template: str | None = None
) -> Any:
    """A transformers tokenizer of at most ``vocab_size`` ids: pad 0, end 1, 256 bytes, merges.

    Args:
        texts: what merges are learned from.
        close_texts: append the end-of-sequence token to every encoded text (encoder-decoder models expect
            it).
        chat_template: what the tokenizer makes of a question.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if close_texts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        padding_side="right" if close_texts else "left",
        chat_template=chat_template,
    )
