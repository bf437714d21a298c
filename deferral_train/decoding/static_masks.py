"""Masks and positions of a pass whose rows are at columns of their own.

Shapes: S slots, W columns of the pass, C columns of the cache, E encoder states. Masks are additive in the model's own
number format, which both ``sdpa`` and ``eager`` attention take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def self_masks(
    columns: Tensor,
    pads: Tensor,
    size: int,
    dtype: torch.dtype,
    windows: Mapping[str, int | None],
    relative: Any,
) -> Tensor | dict[str, Tensor]:
    """What each new column may see of its row: a mask [S, 1 or heads, W, C], or one per type of layer.

    Args:
        columns: [S, W] of the new tokens.
        pads: [S] padding columns on the left.
        size: C.
        dtype: of the masks.
        windows: see :func:`~deferral_train.decoding.static_support.windows_of`.
        relative: T5's first attention layer, whose bias depends on distances, or None.
    """
    every = torch.arange(size, device=columns.device)
    newest = columns[:, :, None]
    # A padding column sees itself, so that no softmax is empty; no token sees it.
    seen = (every <= newest) & ((every >= pads[:, None, None]) | (every == newest))
    masks = {
        kind: additive(_within(seen, every, newest, window), dtype)[:, None]
        for kind, window in windows.items()
    }
    if relative is not None:
        return masks[""] + _bias_beyond(relative, columns, size).to(dtype)
    return masks.get("", masks)


def _within(seen: Tensor, every: Tensor, newest: Tensor, window: int | None) -> Tensor:
    return seen if window is None else seen & (every > newest - window)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``seen``, the lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


def _bias_beyond(attention: Any, columns: Tensor, size: int) -> Tensor:
    """T5's relative bias [S, heads, W, C] of these columns, less the one that the layer will add itself.

    The layer computes the bias of one and the same place for all rows (cache length 0); this moves it to each row's.
    """
    usual = attention.compute_bias(columns.shape[1], size, past_seen_tokens=0)
    distances = torch.arange(size, device=columns.device) - columns[:, :, None]
    buckets = attention._relative_position_bucket(
        distances,
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2) - usual


def positions_of(columns: Tensor, pads: Tensor, context: int | None) -> Tensor:
    """Positions [S, W]: columns without the padding. Drafts that run on behind a row's end stay inside the context;
    their tokens are dropped.
    """
    last = None if context is None else context - 1
    return (columns - pads[:, None]).clamp(min=0, max=last)


def cross_mask(slots: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask over encoder states [S, 1, 1, E] that hides nothing yet."""
    return torch.zeros(slots, 1, 1, size, dtype=dtype, device=device)
