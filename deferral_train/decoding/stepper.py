"""One model, its row cache and how far each row has been fed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from deferral_train.decoding.caches import RowCache
from deferral_train.decoding.facts import facts_of
from deferral_train.decoding.hidden import HiddenTap
from deferral_train.decoding.tokens import TokenRows, on_device


class Stepper:
    """Feeds a model the tokens that it has not seen and returns their logits.

    Args:
        model: a transformers causal or encoder-decoder model.
        tokens: the rows; ``fed[b]`` of the leading columns of row b are in the cache.
        capacity: columns to allocate for the cache at first.
        margin: see :class:`~deferral_train.decoding.caches.RowCache`.
        encoder: encoder states [B, S, D] and mask [B, S] (None = nothing padded), encoder-decoder models
            only.
        tap: hidden states are read here where a rule asks for them.
        vocab_size: logits beyond this many columns are padding of the model's vocabulary and cut off.
    """

    admits_exchange = True  # whether :meth:`exchanges` is worth asking

    def __init__(
        self,
        model: Any,
        tokens: TokenRows,
        capacity: int,
        margin: int | None,
        vocab_size: int,
        encoder: tuple[Tensor, Tensor | None] | None = None,
        tap: HiddenTap | None = None,
    ) -> None:
        self.model, self.tokens, self.tap, self.vocab_size = model, tokens, tap, vocab_size
        self._capacity, self._margin, self._all_encoded = capacity, margin, encoder
        facts = facts_of(model)
        self.cache = RowCache(facts.cache_layers, tokens.row_pads, capacity, margin)
        self.past: Any = self.cache
        if encoder is not None:
            self.past = EncoderDecoderCache(self.cache, DynamicCache())
        self.fed = [0] * len(tokens.rows)  # columns of each row in the cache
        self.valid = list(self.fed)  # of these, columns that hold the row's own tokens
        self.passes = 0
        self._ready: Stepper | None = None  # rows that wait, their prompts fed
        self._ready_rows: dict[int, int] = {}  # where each lies in there
        self._takes_positions = encoder is None and facts.takes_positions
        self._takes_keep = facts.takes_keep
        self._last_position = None if facts.context is None else facts.context - 1
        self._select_encoded()

    def _select_encoded(self) -> None:
        """Encoder states and mask of the running rows."""
        self.encoder: tuple[BaseModelOutput, Tensor | None] | None = None
        if self._all_encoded is not None and self.tokens.rows:
            states, mask = self._all_encoded
            index = self.tokens.index
            if mask is not None and self.tokens.at_once == 1:
                # One row at a time: no other row's padding needs to be attended to and masked.
                row = self.tokens.rows[0]
                present = mask[row].nonzero()
                first, last = int(present[0]), int(present[-1]) + 1
                states, mask = states[:, first:last], mask[:, first:last]
                if bool(mask[row].all()):
                    mask = None
            chosen = BaseModelOutput(last_hidden_state=states.index_select(0, index))
            self.encoder = chosen, None if mask is None else mask.index_select(0, index)

    def feed(self, ahead: int = 0, keep: int = 1) -> Tensor:
        """Feed every row up to its newest token and ``ahead`` drafted tokens beyond.

        Rows that lag behind decide the width of the pass; the others are fed their last tokens again.

        Returns:
            logits [B, keep, V] of the newest ``keep`` columns, float32; the first of them follows the row's
            newest token when ``keep == ahead + 1``.
        """
        lengths = self.tokens.lengths
        behind = max(length - min(valid, length - 1) for length, valid in zip(lengths, self.valid))
        surplus = [fed - max(0, length - behind) for length, fed in zip(lengths, self.fed)]
        if any(surplus):
            self.cache.forget(surplus)
        self.cache.pad_left([max(0, behind - length) for length in lengths])
        inputs = self.tokens.window(behind, ahead)
        self.fed = [length + ahead for length in lengths]
        self.valid = list(self.fed)
        return self._forward(inputs, keep)

    def settle(self) -> None:
        """Rows have grown: what was fed beyond their newest token but one may have been replaced."""
        self.valid = [min(valid, length - 1) for valid, length in zip(self.valid, self.tokens.lengths)]

    def step(self, newest: Tensor, keep: int = 1) -> Tensor:
        """Feed one more column [B, 1] to every row (inside a draft); logits as in :meth:`feed`."""
        self.fed = [fed + 1 for fed in self.fed]
        self.valid = list(self.fed)
        return self._forward(newest, keep)

    def _forward(self, inputs: Tensor, keep: int) -> Tensor:
        columns = inputs.shape[1]
        arguments = self._arguments(inputs, keep)
        logits = self.model(**arguments, past_key_values=self.past, use_cache=True, return_dict=True).logits
        self.cache.extended(columns)
        self.passes += 1
        if logits.shape[1] != keep or logits.shape[2] != self.vocab_size:
            logits = logits[:, -keep:, : self.vocab_size]
        return logits if logits.dtype == torch.float32 else logits.float()

    def _arguments(self, inputs: Tensor, keep: int) -> dict[str, Any]:
        mask, positions = self._mask_and_positions(inputs)
        arguments: dict[str, Any] = {"logits_to_keep": keep} if self._takes_keep else {}
        if self.encoder is not None:
            return arguments | {
                "decoder_input_ids": inputs,
                "decoder_attention_mask": mask,
                "encoder_outputs": self.encoder[0],
                "attention_mask": self.encoder[1],
            }
        if self._takes_positions and positions is not None:
            arguments["position_ids"] = positions
        return arguments | {"input_ids": inputs, "attention_mask": mask}

    def _mask_and_positions(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not any(self.cache.pads):
            return None, None  # the model's own default, and the fastest path
        pads = on_device(self.cache.pads, inputs.device)[:, None]
        columns = torch.arange(self.cache.width + inputs.shape[1], device=inputs.device)[None]
        # Drafts that run on behind a row's end stay inside the context: their tokens are dropped.
        positions = (columns[:, self.cache.width :] - pads).clamp_(min=0, max=self._last_position)
        return (columns >= pads).long(), positions

    def hidden(self, count: int) -> Tensor:
        """Hidden states [B, count, D] of the newest columns of the latest pass; needs a tap."""
        if self.tap is None:
            raise RuntimeError("hidden states were asked for without a tap")
        return self.tap.last(count)

    def keep_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Finished rows have left: so do their caches, encoder states and masks."""
        self.cache.keep_rows(rows, index)
        self.fed = [self.fed[row] for row in rows]
        self.valid = [self.valid[row] for row in rows]
        if self.encoder is not None:
            self.past.cross_attention_cache.batch_select_indices(index)
            self._select_encoded()

    def join(self, group: TokenRows) -> None:
        """New rows come in: their prompts are fed in a pass of their own, their caches put below ours."""
        if not self.cache.written:  # nothing has been fed to anyone yet
            self.cache.pads += group.row_pads
            self.fed += [0] * len(group.rows)
            self.valid += [0] * len(group.rows)
            return
        other = self._fed(group)
        self.cache.join(other.cache)
        self.fed += [fed - 1 for fed in other.fed]
        self.valid += [fed - 1 for fed in other.fed]
        if self.encoder is not None:
            _join_cross(self.past, other.past)

    def _fed(self, group: TokenRows) -> Stepper:
        """Rows in a stepper of their own, their prompts fed."""
        other = Stepper(
            self.model, group, self._capacity, self._margin, self.vocab_size, self._all_encoded, self.tap
        )
        other.feed()
        # The newest token of every row is fed with the next block.
        other.cache.forget([1] * len(group.rows))
        self.passes += other.passes
        return other

    def exchanges(self, rows: Sequence[int]) -> int:
        """How many of the first waiting rows :meth:`exchange` can let in; feeds prompts, several rows at a time."""
        if self.tokens.at_once == 1:  # the encoder's states are those of the row's own columns
            return 0
        if not self.cache.written:
            return len(rows)
        if rows[0] not in self._ready_rows:
            several = self.tokens.waiting[: max(1, self.tokens.at_once // 2)]
            self._ready = self._fed(self.tokens.following(several))
            self._ready_rows = {row: place for place, row in enumerate(several)}
        assert self._ready is not None
        count = 0
        for row in rows:
            if row not in self._ready_rows or not self.cache.admits(self._ready.cache, self._ready_rows[row]):
                break
            count += 1
        return count

    def exchange(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Waiting rows come in where others have ended; nothing is copied but what is theirs."""
        self.fed, self.valid, other = list(self.fed), list(self.valid), self._ready
        for place, row in zip(places, rows):
            if not self.cache.written:  # nothing has been fed to anyone yet
                self.cache.pads[place] = self.tokens.pads[row]
                continue
            assert other is not None
            theirs = self._ready_rows.pop(row)
            self.cache.put(place, other.cache, theirs)
            self.fed[place] = self.valid[place] = other.fed[theirs] - 1
            if self.encoder is not None:
                _put_cross(self.past, place, other.past, theirs)
        if not self._ready_rows:
            self._ready = None
        self.cache.trim()

    def start_over(self, group: TokenRows) -> None:
        """No row runs: the new ones begin with an empty cache."""
        self.cache = RowCache(facts_of(self.model).cache_layers, group.row_pads, self._capacity, self._margin)
        self.past = self.cache if self.encoder is None else EncoderDecoderCache(self.cache, DynamicCache())
        self.fed = [0] * len(group.rows)
        self.valid = list(self.fed)

    def joined(self) -> None:
        """The rows are all in; called once the new ones are part of ``tokens``."""
        self._select_encoded()


def _join_cross(mine: EncoderDecoderCache, theirs: EncoderDecoderCache) -> None:
    layers = zip(mine.cross_attention_cache.layers, theirs.cross_attention_cache.layers)
    for ours, other in layers:
        if isinstance(ours, DynamicLayer) and isinstance(other, DynamicLayer) and ours.is_initialized:
            ours.keys = torch.cat([ours.keys, other.keys])  # type: ignore[list-item]
            ours.values = torch.cat([ours.values, other.values])  # type: ignore[list-item]


def _put_cross(mine: EncoderDecoderCache, place: int, theirs: EncoderDecoderCache, row: int) -> None:
    for ours, other in zip(mine.cross_attention_cache.layers, theirs.cross_attention_cache.layers):
        if isinstance(ours, DynamicLayer) and isinstance(other, DynamicLayer) and ours.is_initialized:
            ours.keys[place] = other.keys[row]  # type: ignore[index]
            ours.values[place] = other.values[row]  # type: ignore[index]
