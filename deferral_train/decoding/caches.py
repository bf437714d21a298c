"""Key/value caches whose rows roll back on their own.

Every row is *right-aligned*: its newest token sits in the last column, padding on the left. A row that lost
more drafted tokens than its neighbours moves right, so that no row ever has a hole. This is exact for rotary
and learned positions (given as ``position_ids``) and for T5, whose relative bias is computed from columns.

Storage is allocated ahead and grows by doubling; appending writes in place, forgetting the same number of
tokens in every row only moves an end mark, and nothing is copied when nothing was rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from deferral_train.errors import InputError


class RowLayer(DynamicLayer):
    """Keys and values [B, heads, columns, width] of one attention layer inside a larger allocation.

    Args:
        capacity: columns allocated at first; grown by doubling.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.start = self.end = 0  # live columns of the allocation
        self.released = 0  # older columns that a sliding window has given up, still counted as positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not uninitialised memory: a masked column still enters the product with weight 0, and 0 *
        # NaN is NaN.
        self.dtype, self.device = key_states.dtype, key_states.device
        self.capacity = max(self.capacity, key_states.shape[-2])
        self.keys = _zeros(key_states, self.capacity)
        self.values = _zeros(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns in place; returns views of every column that these queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if self.end + new > self.capacity:
            self._make_room(new)
        end = self.end + new
        self.keys[:, :, self.end : end] = key_states
        self.values[:, :, self.end : end] = value_states
        self.end = end
        first = self._first_visible(new)
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def _first_visible(self, new: int) -> int:
        return self.start

    def _make_room(self, new: int) -> None:
        live = self.end - self.start
        self.capacity = max(self.capacity, 2 * (live + new))
        self.keys = _moved(self.keys, self.start, self.end, self.capacity)
        self.values = _moved(self.values, self.start, self.end, self.capacity)
        self.start, self.end = 0, live

    def get_seq_length(self) -> int:
        return self.released + self.end - self.start

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns of every row; never copies."""
        self.end += tokens_to_remove

    def move_right(self, rows: Tensor, columns: int) -> None:
        """Shift the given rows so that their last ``columns`` columns are overwritten by what stood before
        them.
        """
        source, target = slice(self.start, self.end - columns), slice(self.start + columns, self.end)
        self.keys[rows, :, target] = self.keys[rows, :, source]
        self.values[rows, :, target] = self.values[rows, :, source]

    def trim_left(self, columns: int) -> None:
        """Give up the oldest ``columns`` columns of every row (all of them padding)."""
        already = min(self.released, columns)
        self.released -= already
        self.start += columns - already

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            indices = indices.to(self.keys.device)
            self.keys = self.keys.index_select(0, indices)
            self.values = self.values.index_select(0, indices)


class SlidingRowLayer(RowLayer):
    """A :class:`RowLayer` whose queries see the last ``window - 1`` columns and themselves.

    Args:
        margin: columns beyond the window that are kept for rolling back; None keeps all.
    """

    is_sliding = True

    def __init__(self, capacity: int, window: int, margin: int | None) -> None:
        super().__init__(capacity)
        self.sliding_window = window
        self.margin = margin

    def _first_visible(self, new: int) -> int:
        return max(self.start, self.end - new - self.sliding_window + 1)

    def _make_room(self, new: int) -> None:
        if self.margin is not None:
            oldest = max(self.start, self.end - (self.sliding_window - 1 + self.margin))
            self.released += oldest - self.start
            self.start = oldest
        super()._make_room(new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.get_seq_length()
        visible = min(past, self.sliding_window - 1)
        return visible + query_length, past - visible

    def get_max_length(self) -> int:
        return self.sliding_window


class RowCache(Cache):
    """Self-attention cache of right-aligned rows.

    Args:
        layers: type of each layer's cache and its sliding window, as transformers would make it.
        pads: padding columns on the left of each row, [B] host integers.
        capacity: columns to allocate at first.
        margin: most columns that a later :meth:`forget` takes from a row, None where that is not known.
        trims: give up columns that are padding in every row; False where a model counts its positions by columns.

    Raises:
        InputError: a layer cannot be rolled back (recurrent state, compressed or indexed cache).
    """

    def __init__(
        self,
        layers: Sequence[tuple[type, int | None]],
        pads: Sequence[int],
        capacity: int,
        margin: int | None,
        trims: bool = True,
    ) -> None:
        made = [_row_layer(kind, window, capacity, margin) for kind, window in layers]
        super().__init__(layers=list(made))
        self.pads, self.trims = list(pads), trims
        self.width = 0

    @property
    def written(self) -> list[RowLayer]:
        """Layers in use: a T5 decoder shallower than its encoder leaves layers that are never written."""
        return [layer for layer in self.layers if isinstance(layer, RowLayer) and layer.is_initialized]

    def extended(self, columns: int) -> None:
        """Record that the model has appended ``columns`` columns."""
        self.width += columns

    def forget(self, counts: Sequence[int]) -> None:
        """Drop the newest ``counts[b]`` tokens of row b and realign.

        With equal counts nothing is copied. Otherwise rows that lose more move right and their padding grows;
        columns that are padding in every row are given up.
        """
        least = min(counts)
        if least:
            self._each_layer("crop", -least)
            self.width -= least
        if max(counts) == least:
            return
        for shift in sorted({count - least for count in counts} - {0}):
            rows = [row for row, count in enumerate(counts) if count - least == shift]
            self._move_right(rows, shift)
        self.trim()

    def pad_left(self, columns: Sequence[int]) -> None:
        """The next ``columns[b]`` columns of row b, whose cache is empty, will be no tokens of it."""
        if any(columns):
            self.pads = [pad + more for pad, more in zip(self.pads, columns)]

    def _move_right(self, rows: list[int], shift: int) -> None:
        for row in rows:
            self.pads[row] += shift
        for layer in self.written:
            layer.move_right(torch.tensor(rows, device=layer.device), shift)

    def trim(self) -> None:
        """Give up the columns that are padding in every row; of a cache that nothing has been fed to, none."""
        unused = min(*self.pads, self.width)
        if unused and self.trims:
            self._each_layer("trim_left", unused)
            self.width -= unused
            self.pads = [pad - unused for pad in self.pads]

    def _each_layer(self, method: str, columns: int) -> None:
        for layer in self.written:
            getattr(layer, method)(columns)

    def keep_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Only these rows stay; ``index`` is the same selection on the device."""
        self.batch_select_indices(index)
        self.pads = [self.pads[row] for row in rows]
        self.trim()


def _row_layer(kind: type, window: int | None, capacity: int, margin: int | None) -> RowLayer:
    if kind is DynamicLayer:
        return RowLayer(capacity)
    if kind is DynamicSlidingWindowLayer and window is not None:
        return SlidingRowLayer(capacity, window, margin)
    raise InputError(
        f"cache layer {kind.__name__}: cannot be rolled back row by row; "
        "use a model whose layers are full or sliding-window attention"
    )


def _zeros(like: Tensor, columns: int) -> Tensor:
    batch, heads, _, width = like.shape
    return like.new_zeros(batch, heads, columns, width)


def _moved(buffer: Tensor, start: int, end: int, capacity: int) -> Tensor:
    fresh = _zeros(buffer, capacity)
    fresh[:, :, : end - start] = buffer[:, :, start:end]
    return fresh
