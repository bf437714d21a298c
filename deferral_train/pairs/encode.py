"""Prompts to token ids: chat templates, where a reference ends, and a list of what had to be left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deferral_train.errors import InputError
from deferral_train.pairs.prompts import Prompt

CHAT = ("auto", "on", "off")


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt; ``reference_ids`` is empty where there is no reference."""

    id: str
    input_ids: list[int]
    reference_ids: list[int]


@dataclass(frozen=True)
class Notice:
    """Why the prompt ``id`` was left out or cut, in words."""

    id: str
    reason: str

    def __str__(self) -> str:
        return f"prompt {self.id}: {self.reason}"


@dataclass
class EncodedPrompts:
    """``kept`` in the order given; ``skipped`` were left out, ``cut`` are kept with a shortened reference."""

    kept: list[EncodedPrompt] = field(default_factory=list)
    skipped: list[Notice] = field(default_factory=list)
    cut: list[Notice] = field(default_factory=list)


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    is_encoder_decoder: bool = False,
    chat: str = "auto",
    max_prompt_tokens: int | None = None,
    max_reference_tokens: int | None = None,
    require_reference: bool = False,
    reference_eos: bool | None = None,
) -> EncodedPrompts:
    """Encode each prompt alone, as ``generate`` would see it, and its reference as what should follow.

    Args:
        tokenizer: a transformers tokenizer.
        is_encoder_decoder: the prompt goes to the encoder, the reference to the decoder.
        chat: ``auto`` uses the tokenizer's chat template where it has one, ``on`` insists, ``off`` never.
        max_prompt_tokens: longer prompts are skipped and reported, never cut.
        max_reference_tokens: longer references are cut to this many tokens and reported in ``cut``.
        require_reference: prompts with an empty or missing reference are skipped and reported.
        reference_eos: end references with the end-of-sequence token; default True for encoder-decoder pairs
            and chats, where the end belongs to the answer, False for text that goes on.
    """
    if chat not in CHAT:
        raise InputError(f"chat={chat!r}: use one of {', '.join(CHAT)}")
    template = chat != "off" and bool(getattr(tokenizer, "chat_template", None))
    if chat == "on" and not template:
        raise InputError("chat='on': the tokenizer has no chat template; use chat='off'")
    ends = (is_encoder_decoder or template) if reference_eos is None else reference_eos
    result = EncodedPrompts()
    for prompt in prompts:
        reason = _missing(prompt, require_reference)
        with _one_line(prompt):
            input_ids = [] if reason else _prompt_ids(tokenizer, prompt.prompt, template, is_encoder_decoder)
        if not reason and max_prompt_tokens is not None and len(input_ids) > max_prompt_tokens:
            reason = f"{len(input_ids)} tokens, more than the limit of {max_prompt_tokens}"
        if reason:
            result.skipped.append(Notice(prompt.id, reason))
            continue
        with _one_line(prompt):
            reference_ids = _reference_ids(tokenizer, prompt.reference, ends)
        if max_reference_tokens is not None and len(reference_ids) > max_reference_tokens:
            result.cut.append(
                Notice(prompt.id, f"reference of {len(reference_ids)} tokens cut to {max_reference_tokens}")
            )
            reference_ids = reference_ids[:max_reference_tokens]
        result.kept.append(EncodedPrompt(prompt.id, input_ids, reference_ids))
    return result


@contextmanager
def _one_line(prompt: Prompt) -> Iterator[None]:
    """Within, what a tokenizer or its chat template raises is one line that names the prompt."""
    try:
        yield
    except Exception as error:  # a damaged config, a template that refuses a message: each its own class
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"tokenizer: prompt {prompt.id} cannot be encoded ({reason}); mend tokenizer_config.json or its template, "
            "or use chat='off'"
        ) from error


def _missing(prompt: Prompt, require_reference: bool) -> str | None:
    if not prompt.prompt.strip():
        return "empty prompt"
    if require_reference and not (prompt.reference or "").strip():
        return "no reference" if prompt.reference is None else "empty reference"
    return None


def _prompt_ids(tokenizer: Any, text: str, template: bool, is_encoder_decoder: bool) -> list[int]:
    if template:
        message = [{"role": "user", "content": text}]
        # Where a template can ask for thoughts first (Qwen3's does unless told otherwise), references hold none.
        switch = {"enable_thinking": False}
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False, **switch)
    ids = list(tokenizer(text, add_special_tokens=not template)["input_ids"])
    # A tokenizer that closes every text would make a decoder-only model continue after its own end.
    if not is_encoder_decoder and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _reference_ids(tokenizer: Any, text: str | None, ends: bool) -> list[int]:
    if not text:
        return []
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids
