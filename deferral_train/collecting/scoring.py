"""One teacher-forced pass of each model over a batch of continuations. Right padding, masks, explicit places.

B sequences, L padded length, M = B * (kept columns) logit rows, N scored positions, D hidden width. In a
causal decoder right padding never reaches a real position, so that batch composition moves values by rounding alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from deferral_train.decoding.hidden import tap_hidden
from deferral_train.pairs.padding import pad


@dataclass(frozen=True)
class Inputs:
    """A batch ready for a forward pass.

    Attributes:
        model_inputs: keyword arguments of the forward pass.
        keep: logits are wanted of the last ``keep`` columns only.
        rows: [N] int64, place of each scored position among the M = B * keep logit rows.
    """

    model_inputs: dict[str, Tensor]
    keep: int
    rows: Tensor


@dataclass(frozen=True)
class Past:
    """Caches and encoder states from which later passes over the same texts start.

    Attributes:
        cache: keys and values of every column, in full layers.
        encoder, encoder_mask: encoder states [B, S, D] and mask [B, S]; None in decoder-only models.
    """

    cache: Any
    encoder: Tensor | None
    encoder_mask: Tensor | None


@dataclass(frozen=True)
class ModelOutputs:
    """A model's outputs over a batch: ``logits`` [M, V], ``hidden`` [N, D] float16 or None, ``past`` where kept."""

    logits: Tensor
    hidden: Tensor | None
    past: Past | None = None


def make_inputs(
    model: Any, prompts: Sequence[list[int]], continuations: Sequence[list[int]], device: torch.device
) -> Inputs:
    """Inputs whose scored positions are the continuations' tokens, sequence by sequence.

    Args:
        prompts: token ids of each prompt.
        continuations: tokens that follow it, at least one each.
    """
    make = _encoder_decoder if model.config.is_encoder_decoder else _decoder_only
    return make(model, prompts, continuations, device)


def _encoder_decoder(
    model: Any, prompts: Sequence[list[int]], continuations: Sequence[list[int]], device: torch.device
) -> Inputs:
    start = decoder_start(model)
    ids, mask = _padded(prompts)
    decoder_ids, decoder_mask = _padded([[start, *tokens[:-1]] for tokens in continuations])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
    rows = decoder_mask.flatten().nonzero()[:, 0]
    return Inputs(_to(inputs, device), decoder_ids.shape[1], rows.to(device))


def _decoder_only(
    model: Any, prompts: Sequence[list[int]], continuations: Sequence[list[int]], device: torch.device
) -> Inputs:
    ids, mask = _padded([[*prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, continuations)])
    keep = ids.shape[1] - min(map(len, prompts)) + 1
    first = torch.tensor([len(prompt) for prompt in prompts]) - 1 - (ids.shape[1] - keep)
    count = torch.tensor([len(tokens) for tokens in continuations])
    column = torch.arange(keep)
    scored = (column >= first[:, None]) & (column < (first + count)[:, None])
    places = torch.arange(ids.shape[1]).expand(len(ids), -1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    return Inputs(_to(inputs, device), keep, scored.flatten().nonzero()[:, 0].to(device))


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad(list(rows), 0)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _to(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def decoder_start(model: Any) -> int:
    """The token that an encoder-decoder model's decoder begins with."""
    for holder in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            if value is not None:
                return int(value)
    return 0


def score(model: Any, inputs: Inputs, want_hidden: bool = False, keep_past: bool = False) -> ModelOutputs:
    """Run the model; logits of the kept columns, hidden states of the scored positions, the cache where asked for.

    The hidden state is the decoder's output after its final norm, read by a hook: no other layer is kept.
    """
    accepted = inspect.signature(model.forward).parameters
    extra = {"logits_to_keep": inputs.keep} if "logits_to_keep" in accepted else {}
    given = {name: value for name, value in inputs.model_inputs.items() if name in accepted}
    extra |= {"past_key_values": _empty_cache(model)} if keep_past else {}
    with tap_hidden(model, want_hidden) as tap:
        output = model(**given, **extra, use_cache=keep_past)
        logits = output.logits[:, -inputs.keep :]
        hidden = None
        if tap is not None and tap.states is not None:
            states = tap.states[:, -inputs.keep :]
            rows = inputs.rows.to(states.device)  # of a spread model another device than its inputs'
            hidden = half(states.reshape(-1, states.shape[-1]).index_select(0, rows))
    past = None
    if keep_past:
        states = getattr(output, "encoder_last_hidden_state", None)
        past = Past(extra["past_key_values"], states, None if states is None else given["attention_mask"])
    return ModelOutputs(logits.reshape(-1, logits.shape[-1]), hidden, past)


def _empty_cache(model: Any) -> Any:
    """Full layers for every model: a sliding-window layer forgets columns that a substitution begins from."""
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache()


def half(states: Tensor) -> Tensor:
    """float16, values beyond its range put at its ends rather than made infinite."""
    most = torch.finfo(torch.float16).max
    return states.float().clamp(-most, most).half()
