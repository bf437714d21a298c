"""Batches of token lists as padded tensors, and one teacher-forced pass over such a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a position without a target


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """Right-pad token lists to an int64 tensor [B, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def next_token_logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits [B, T, V] that predict ``batch["labels"]``; an encoder-decoder is fed the shifted labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return model(**inputs, use_cache=False).logits


def answered(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    """Inputs of one decoder and, place by place, the token to follow; ignored inside the prompt. Neither is empty."""
    return prompt + answer[:-1], [IGNORED] * (len(prompt) - 1) + answer
