"""Key/value buffers of fixed shape: rows live in slots, tokens at their own columns.

Column c of a slot holds the key of token c of its row, prompt padding included. A pass writes at columns given per
slot and a mask made from the row's newest column hides what lies behind it, so that taking tokens back costs nothing:
the next pass simply writes at earlier columns. Addresses and shapes never change, which is what CUDA graphs and
compilers without dynamic shapes ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from deferral_train.decoding.caches import RowCache, RowLayer


@dataclass
class Places:
    """Where the pass that runs now writes.

    Attributes:
        slots: [S, 1] numbers of the slots.
        columns: [S, W] columns that the pass writes, per slot.
        size: C, columns of each slot.
    """

    slots: Tensor
    size: int
    columns: Tensor = field(init=False)


class SlotLayer(CacheLayerMixin):
    """Keys and values [S, heads, C, width] of one attention layer.

    Args:
        places: shared by all layers.
        like: the layer of an ordinary cache after one pass, for shapes and types; None for a layer never used.
    """

    is_compileable = True
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, places: Places, like: CacheLayerMixin | None) -> None:
        super().__init__()
        self.places = places
        if like is not None and like.keys is not None and like.values is not None:
            # Zeros, not uninitialised memory: a masked column still enters the product with weight 0.
            self.keys = _buffer(like.keys, len(places.slots), places.size)
            self.values = _buffer(like.values, len(places.slots), places.size)
            self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError("a layer was written that the first pass did not write")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [S, heads, W, width] at each slot's columns, in place; returns the whole buffers."""
        slots, columns = self.places.slots, self.places.columns
        self.keys[slots, :, columns] = key_states.transpose(1, 2)
        self.values[slots, :, columns] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.size, 0

    def get_seq_length(self) -> int:
        return 0  # positions are given with every pass

    def get_max_length(self) -> int:
        return self.places.size


class SlotCache(Cache):
    """The self-attention cache of S rows.

    Args:
        slots, size: S and C.
        like: an ordinary cache of the model after one pass over one row.
        device: where the buffers live.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]

    def __init__(self, slots: int, size: int, like: Cache, device: torch.device) -> None:
        self.places = Places(torch.arange(slots, device=device)[:, None], size)
        super().__init__(layers=[SlotLayer(self.places, _written(layer)) for layer in like.layers])

    def load(self, cache: RowCache, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Put the rows of a right-aligned cache, ``lengths[b]`` columns of row b, into these slots."""
        index = torch.tensor(slots, device=self.places.slots.device)
        for mine, theirs in zip(self.layers, cache.layers):
            if isinstance(theirs, RowLayer) and theirs.is_initialized:
                for buffer, source in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    _load(buffer, source[:, :, theirs.start : theirs.end], index, slots, lengths)


def _written(layer: Any) -> CacheLayerMixin | None:
    return layer if layer.is_initialized else None


def _buffer(like: Tensor, slots: int, size: int) -> Tensor:
    return like.new_zeros(slots, like.shape[1], size, like.shape[3])


def _load(
    buffer: Tensor, source: Tensor, index: Tensor, slots: Sequence[int], lengths: Sequence[int]
) -> None:
    width = source.shape[2]
    if min(lengths) == width:
        buffer[index, :, :width] = source
        return
    for row, (slot, length) in enumerate(zip(slots, lengths)):
        buffer[slot, :, :length] = source[row, :, width - length :]


class CrossLayer(DynamicLayer):
    """Keys and values [S, heads, E, width] of the encoder's states, written when a row comes in."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, size: int, like: CacheLayerMixin | None) -> None:
        super().__init__()
        if like is not None and like.keys is not None and like.values is not None:
            self.keys, self.values = _buffer(like.keys, slots, size), _buffer(like.values, slots, size)
            self.dtype, self.device = self.keys.dtype, self.keys.device
            self.is_initialized = True


class CrossCache(Cache):
    """The cross-attention cache of S rows over E encoder states.

    Args:
        slots, size: S and E.
        like: an ordinary cross-attention cache of the model after one pass over one row.
    """

    layers: list[CrossLayer]  # type: ignore[assignment]

    def __init__(self, slots: int, size: int, like: Cache) -> None:
        super().__init__(layers=[CrossLayer(slots, size, _written(layer)) for layer in like.layers])

    def load(self, cache: Cache, index: Tensor) -> None:
        """Put the rows of another cross-attention cache into the slots ``index``."""
        for mine, theirs in zip(self.layers, cache.layers):
            if isinstance(theirs, DynamicLayer) and theirs.is_initialized:
                for buffer, source in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    if isinstance(source, Tensor):
                        buffer[index, :, : source.shape[2]] = source


def encoder_decoder(own: SlotCache, cross: CrossCache) -> EncoderDecoderCache:
    """Both, with the cross-attention marked as filled: a pass then never computes it."""
    past = EncoderDecoderCache(own, cross)
    past.is_updated = dict.fromkeys(range(len(cross.layers)), True)
    return past
