"""Encoder states of prompts of different lengths, without the work on padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

# Rows that a CPU encodes together: more gain nothing per token, and differ more in length.
TOGETHER = 8


@torch.no_grad()
def encode(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Encoder states [R, S, D] of prompts [R, S].

    On a CPU, where every column costs, prompts of about the same length go through the encoder together, without the
    columns behind the longest of them; their states there are 0. Columns on the left stay, since some encoders count
    positions from them.

    Args:
        model: an encoder-decoder model.
        mask: [R, S], 0 at padding; None where there is none.
    """
    encoder = model.get_encoder()
    if mask is None or ids.device.type != "cpu" or len(ids) == 1:
        return encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
    columns = torch.arange(1, ids.shape[1] + 1)
    ends = (mask.bool() * columns).amax(dim=1)  # behind the last token of each row
    states: Tensor | None = None
    for rows in ends.argsort(stable=True).split(TOGETHER):
        width = max(1, int(ends[rows].max()))
        part = encoder(input_ids=ids[rows, :width], attention_mask=mask[rows, :width], return_dict=True)
        found = part.last_hidden_state
        if states is None:
            states = found.new_zeros(*ids.shape, found.shape[-1])
        states[rows, :width] = found
    assert states is not None
    return states


def encoder_outputs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, BaseModelOutput]:
    """What spares ``generate`` its own pass of the encoder over the whole call; arguments as for :func:`encode`."""
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=encode(model, input_ids, attention_mask))}
