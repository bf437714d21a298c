"""Inputs of a model beside tokens, as its own ``generate`` would prepare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.cached_model import ModelInputs, rows_of
from deferral_train.decoding.facts import ModelFacts, core_of, facts_of
from deferral_train.decoding.tokens import TokenRows
from deferral_train.errors import InputError

# Arguments with one value for each column, and how they go on behind the prompt.
CONTINUED = {"position_ids": "count", "token_type_ids": "repeat", "mm_token_type_ids": "zero"}


def decoder_inputs(
    model: Any, tokens: TokenRows, mask: Tensor | None, given: Mapping[str, Any], verifier: bool
) -> ModelInputs:
    """Inputs of a decoder-only model.

    Args:
        tokens: of the call, nothing emitted yet.
        mask: prompt mask [R, P], or None.
        given: what ``generate`` prepared for the verifier, and the caller's own arguments.
        verifier: whether the model is the verifier; a drafter takes the caller's arguments, else its own.
    """
    facts, prompt = facts_of(model), tokens.ids[:, : tokens.prompt_length]
    columns: dict[str, Tensor] = {}
    for name in CONTINUED:
        value = given.get(name)
        if name == "position_ids" and not verifier and value is not None and not _is_callers(value, mask):
            value = None
        if value is None and name == "position_ids":
            value = _own_positions(model, facts, prompt, mask)
        if value is not None and name in facts.takes:
            columns[name] = _continued(value, CONTINUED[name], tokens, facts)
    return ModelInputs(columns)


def _is_callers(positions: Tensor, mask: Tensor | None) -> bool:
    """True where positions are other than ``generate`` makes them from the mask."""
    made = torch.arange(positions.shape[-1], device=positions.device)[None]
    if mask is not None:
        made = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return positions.dim() == 2 and not bool((positions == made).all())


def _own_positions(model: Any, facts: ModelFacts, prompt: Tensor, mask: Tensor | None) -> Tensor | None:
    """Positions of the prompt [.., R or 1, P] as the model's own ``generate`` would make them."""
    prepare = getattr(core_of(model), "_prepare_position_ids_for_generation", None)
    if prepare is None or not facts.takes_positions:
        return None
    return prepare(prompt, {"attention_mask": mask})


def _continued(value: Tensor, how: str, tokens: TokenRows, facts: ModelFacts) -> Tensor:
    """Values of a prompt's columns [.., R or 1, P] for all columns that a row may have, [.., R, C]."""
    rows, width = tokens.ids.shape
    value = value.to(tokens.device)
    value = value.expand(*value.shape[:-2], rows, value.shape[-1])
    further = width - value.shape[-1]
    last = value[..., -1:]
    following = last.expand(*last.shape[:-1], further)
    if how == "count":
        following = following + torch.arange(1, further + 1, device=value.device)
        if facts.context is not None:
            # Drafts that run on behind a row's end stay inside the context: their tokens are dropped.
            following = following.clamp(max=max(facts.context - 1, 0))
    elif how == "zero":
        following = torch.zeros_like(following)
    return torch.cat([value, following], dim=-1)


def encoder_inputs(
    models: Sequence[Any],
    given: Mapping[str, Any],
    inputs_tensor: Tensor | None,
    drafter_inputs: dict[str, Tensor] | None,
    rows: int,
) -> list[ModelInputs]:
    """Inputs of encoder-decoder models, drafters first and the verifier last, one encoded row per decoded row."""
    mask = padding_or_none(given.get("attention_mask"))
    verifier = ModelInputs(encoder=(given["encoder_outputs"], mask))
    if len(models) == 1:
        return [verifier]
    if drafter_inputs is None:
        ids = encoder_ids(inputs_tensor)
        drafter_mask = None if mask is None else mask[:: rows // len(ids)]
    else:
        ids = drafter_inputs["input_ids"]
        drafter_mask = padding_or_none(drafter_inputs.get("attention_mask"))
    repeats = rows // len(ids)
    found = []
    for model in models[:-1]:
        encoder, device = core_of(model).get_encoder(), core_of(model).device
        own_mask = None if drafter_mask is None else drafter_mask.to(device)
        output = encoder(input_ids=ids.to(device), attention_mask=own_mask, return_dict=True)
        if repeats > 1:
            index = torch.arange(len(ids), device=device).repeat_interleave(repeats)
            output = rows_of(output, index)
            own_mask = None if own_mask is None else own_mask.index_select(0, index)
        found.append(ModelInputs(encoder=(output, own_mask)))
    return [*found, verifier]


def encoder_ids(inputs_tensor: Tensor | None) -> Tensor:
    """The encoder's ids for the drafter.

    Raises:
        InputError: the verifier was given something else than ids.
    """
    # Given encoder states alone, generate makes up ids of -100.
    if inputs_tensor is None or inputs_tensor.dim() != 2 or bool((inputs_tensor < 0).any()):
        raise InputError(
            "drafter_inputs is missing: the drafter's encoder needs input_ids; pass drafter_inputs="
        )
    return inputs_tensor


def padding_or_none(mask: Tensor | None) -> Tensor | None:
    """A mask that masks something, else None."""
    return None if mask is None or bool(mask.all()) else mask


def prompts_of(
    model: Any, tokens: TokenRows, inputs_tensor: Tensor | None, given: Mapping[str, Any]
) -> list[list[int]]:
    """The ids that Max-Gram may copy from, per row, without padding."""
    if not core_of(model).config.is_encoder_decoder:
        prompts = tokens.ids[:, : tokens.prompt_length].tolist()
        return [row[pad:] for row, pad in zip(prompts, tokens.pads)]
    ids = encoder_ids(inputs_tensor)
    repeats = len(tokens.ids) // len(ids)
    rows = ids.repeat_interleave(repeats, dim=0).tolist()
    mask = padding_or_none(given.get("attention_mask"))
    if mask is None:
        return rows
    return [
        [token for token, present in zip(row, flags) if present] for row, flags in zip(rows, mask.tolist())
    ]
