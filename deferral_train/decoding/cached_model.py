"""One model, its row cache and how far each row has been fed.

A pass is what the model's own ``generate`` would make of it: ``prepare_inputs_for_generation`` is asked every time, so
that positions, masks and switches of the cache are the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from deferral_train.decoding.caches import RowCache
from deferral_train.decoding.facts import core_of, facts_of
from deferral_train.decoding.hidden import HiddenTap
from deferral_train.decoding.tokens import TokenRows, on_device
from deferral_train.errors import InputError


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of a model beside tokens.

    Attributes:
        columns: arguments with a value for every column of every row, [.., R, C] by name (``position_ids``).
        encoder: what the encoder put out for all rows, states [R, S, D] first, and its mask [R, S] (None = nothing
            padded); encoder-decoder models only.
        constant: arguments that are the same in every pass.
    """

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    encoder: tuple[ModelOutput, Tensor | None] | None = None
    constant: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheRoom:
    """How large a cache is made.

    Attributes:
        capacity: columns to allocate at first.
        margin: most columns that are ever rolled back, None where that is not known.
        trims: see :class:`~deferral_train.decoding.caches.RowCache`.
    """

    capacity: int
    margin: int | None
    trims: bool = True


class CachedModel:
    """Feeds a model the tokens that it has not seen and returns their logits.

    Args:
        model: a transformers causal or encoder-decoder model.
        tokens: the rows; ``fed[b]`` of the leading columns of row b are in the cache.
        room: of the cache.
        inputs: what it is given beside tokens.
        tap: hidden states are read here where a rule asks for them.
    """

    def __init__(
        self,
        model: Any,
        tokens: TokenRows,
        room: CacheRoom,
        inputs: ModelInputs | None = None,
        tap: HiddenTap | None = None,
    ) -> None:
        self.model, self.core = model, core_of(model)
        self.tokens, self.tap, self.room = tokens, tap, room
        self.facts = facts_of(model)
        self.inputs = inputs or ModelInputs()
        self.passes = 0
        self.start_over()

    def start_over(self) -> None:
        """Forget everything: the running rows begin with an empty cache."""
        room, facts = self.room, self.facts
        self.cache = RowCache(
            facts.cache_layers, self.tokens.row_pads, room.capacity, room.margin, room.trims
        )
        self.past: Any = self.cache
        if self.inputs.encoder is not None:
            self.past = EncoderDecoderCache(self.cache, DynamicCache())
        self.fed = [0] * len(self.tokens.rows)  # columns of each row in the cache
        self.valid = list(self.fed)  # of these, columns that hold the row's own tokens
        self._long = False  # whether the cache was made with the long factors of longrope
        self._select_encoded()

    def _select_encoded(self) -> None:
        """Encoder states and mask of the running rows."""
        self.encoder: tuple[ModelOutput, Tensor | None] | None = None
        if self.inputs.encoder is not None and self.tokens.rows:
            output, mask = self.inputs.encoder
            if len(self.tokens.rows) < len(output[0]):
                index = self.tokens.index.to(output[0].device)
                output = rows_of(output, index)
                mask = None if mask is None else mask.index_select(0, index)
            self.encoder = output, mask

    def feed(self, ahead: int = 0, keep: int = 1) -> Tensor:
        """Feed every row up to its newest token and ``ahead`` drafted tokens beyond.

        Rows that lag behind decide the width of the pass; the others are fed their last tokens again.

        Returns:
            logits [B, keep, V] of the newest ``keep`` columns, float32; the first of them follows the row's
            newest token when ``keep == ahead + 1``.
        """
        switch, length = self.facts.long_rope, max(self.tokens.lengths)
        if switch is not None and length <= switch < length + ahead:
            # One pass may not see both sets of rotary factors; generate makes one for each token.
            near = switch - length
            first = self.feed(near, keep - (ahead - near)) if keep > ahead - near else None
            if first is None:
                self.feed(near)
            second = self.step(self.tokens.window(-near, ahead), min(keep, ahead - near))
            return second if first is None else torch.cat([first, second], dim=1)
        if switch is not None and self._long and length + ahead <= switch:
            self.start_over()  # drafts beyond the switch were dropped, and with them what they rotated
        lengths = self.tokens.lengths
        behind = max(length - min(valid, length - 1) for length, valid in zip(lengths, self.valid))
        surplus = [fed - max(0, length - behind) for length, fed in zip(lengths, self.fed)]
        if any(surplus):
            self.cache.forget(surplus)
        self.cache.pad_left([max(0, behind - length) for length in lengths])
        self.fed = [length + ahead for length in lengths]
        self.valid = list(self.fed)
        return self._pass(behind + ahead, ahead, keep)

    def settle(self) -> None:
        """Rows have grown: what was fed beyond their newest token but one may have been replaced."""
        self.valid = [min(valid, length - 1) for valid, length in zip(self.valid, self.tokens.lengths)]

    def step(self, newest: Tensor, keep: int = 1) -> Tensor:
        """Feed more columns [B, n], written to the rows already, to every row (inside a draft); logits as in
        :meth:`feed`.
        """
        columns = newest.shape[1]
        self.fed = [fed + columns for fed in self.fed]
        self.valid = list(self.fed)
        return self._pass(columns, self.fed[0] - self.tokens.lengths[0], keep)

    def _pass(self, columns: int, ahead: int, keep: int) -> Tensor:
        """Feed the newest ``columns`` of the rows, ``ahead`` of them drafted."""
        if self.facts.uncounted is None or columns == 1:
            return self._one_pass(columns, ahead, keep)
        first = self.tokens.prompt_length if self.cache.width == 0 else 1
        further = self.tokens.window(columns - ahead, ahead)[:, max(first - 1, 0) :]
        if not bool((further == self.facts.uncounted).any()):
            return self._one_pass(columns, ahead, keep)
        found: list[Tensor] = []
        states: list[Tensor] = []
        for behind in range(columns - first, -1, -1):
            found.append(self._one_pass(first if behind == columns - first else 1, ahead - behind, 1))
            if self.tap is not None:
                states.append(self.tap.last(1))
        if self.tap is not None:
            self.tap.states = torch.cat(states, dim=1)
        return torch.cat(found[-keep:], dim=1)

    def _one_pass(self, columns: int, ahead: int, keep: int) -> Tensor:
        """Feed the newest ``columns`` of the rows, ``ahead`` of them drafted."""
        total = self.cache.width + columns
        given = self._prepared(columns, total, ahead, keep)
        if self.cache.width and given.get("past_key_values") is None:
            # The model drops its cache (longrope): all of the text goes through it again.
            fed, valid = self.fed, self.valid
            self.start_over()
            self.fed, self.valid = fed, valid
            given = self._prepared(total, total, ahead, keep)
        given["past_key_values"] = self.past
        logits = self.model(**given, return_dict=True).logits
        self.cache.extended(total - self.cache.width)
        held = self.cache.get_seq_length()
        if held not in (0, self.cache.width):
            raise InputError(
                f"{self.facts.name} keeps {held} columns in its cache for {self.cache.width} tokens: its rows cannot "
                "be rolled back; use another model"
            )
        self._long = self.facts.long_rope is not None and total > self.facts.long_rope
        self.passes += 1
        if logits.shape[1] != keep:
            logits = logits[:, -keep:]
        return logits if logits.dtype == torch.float32 else logits.float()

    def _prepared(self, columns: int, total: int, ahead: int, keep: int) -> dict[str, Any]:
        """Arguments of a pass over the newest ``columns`` of ``total``."""
        tokens, mask = self.tokens, self._mask(total)
        given: dict[str, Any] = {
            name: tokens.window(columns - ahead, ahead, table) for name, table in self.inputs.columns.items()
        }
        given |= {"past_key_values": self.past, **self._given(mask, keep)}
        prepare = getattr(self.core, "prepare_inputs_for_generation", None)
        if prepare is None:  # a plain module that is called like a model
            name = "input_ids" if self.encoder is None else "decoder_input_ids"
            return {name: tokens.window(columns - ahead, ahead), **given}
        first = self.cache.width == 0
        return prepare(
            tokens.window(total - ahead, ahead),
            next_sequence_length=columns,
            is_first_iteration=first,
            **given,
        )

    def _given(self, mask: Tensor | None, keep: int) -> dict[str, Any]:
        """Arguments of a pass beside tokens, their columns and what the model remembers."""
        given: dict[str, Any] = {"use_cache": True, **self.inputs.constant}
        if "logits_to_keep" in self.facts.takes:
            given["logits_to_keep"] = keep
        if self.encoder is None:
            return {**given, "attention_mask": mask}
        states, padding = self.encoder
        return {
            **given,
            "encoder_outputs": states,
            "attention_mask": padding,
            "decoder_attention_mask": mask,
        }

    def _mask(self, total: int) -> Tensor | None:
        """Which of ``total`` columns are tokens of each row, [B, total]; None where all are."""
        if not any(self.cache.pads):
            return None
        pads = on_device(self.cache.pads, self.tokens.device)[:, None]
        return (torch.arange(total, device=self.tokens.device)[None] >= pads).long()

    def hidden(self, count: int) -> Tensor:
        """Hidden states [B, count, D] of the newest columns of the latest pass, on the rows' device; needs a tap."""
        if self.tap is None:
            raise RuntimeError("hidden states were asked for without a tap")
        return self.tap.last(count).to(self.tokens.device)

    def keep_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Finished rows have left: so do their caches, encoder states and masks."""
        self.cache.keep_rows(rows, index)
        self.fed = [self.fed[row] for row in rows]
        self.valid = [self.valid[row] for row in rows]
        if self.encoder is not None:
            for layer in self.past.cross_attention_cache.layers:
                if layer.is_initialized:
                    layer.batch_select_indices(index.to(layer.keys.device))
            self._select_encoded()


def rows_of(output: ModelOutput, index: Tensor) -> ModelOutput:
    """An encoder's output for the rows ``index`` [B] alone.

    All of it: a decoder may read more than the states (the routes of experts).
    """
    rows = len(output[0])

    def selected(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(selected(one) for one in value)
        whole = isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        return value.index_select(0, index.to(value.device)) if whole else value

    # Fields that are None stay attributes: ``items`` leaves them out. Subclasses of ModelOutput are dataclasses.
    names = [one.name for one in fields(output)]  # type: ignore[arg-type]
    return type(output)(**{name: selected(getattr(output, name)) for name in names})
