"""One model, its row cache and how far each row has been fed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from deferral_train.decoding.caches import RowCache
from deferral_train.decoding.facts import facts_of
from deferral_train.decoding.hidden import HiddenTap
from deferral_train.decoding.tokens import TokenRows


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
        self.encoder = encoder
        facts = facts_of(model)
        self.cache = RowCache(facts.cache_layers, tokens.pads, capacity, margin)
        self.past: Any = self.cache
        if encoder is not None:
            self.past = EncoderDecoderCache(self.cache, DynamicCache())
        self.fed = [0] * len(tokens.pads)
        self.passes = 0
        self._takes_positions = encoder is None and facts.takes_positions
        self._takes_keep = facts.takes_keep
        self._encoder_states = None if encoder is None else BaseModelOutput(last_hidden_state=encoder[0])

    def feed(self, ahead: int = 0, keep: int = 1) -> Tensor:
        """Feed every row up to its newest token and ``ahead`` drafted tokens beyond.

        Rows that lag behind decide the width of the pass; the others are fed their last tokens again.

        Returns:
            logits [B, keep, V] of the newest ``keep`` columns, float32; the first of them follows the row's
            newest token when ``keep == ahead + 1``.
        """
        lengths = self.tokens.lengths
        behind = max(length - min(fed, length - 1) for length, fed in zip(lengths, self.fed))
        surplus = [fed - (length - behind) for length, fed in zip(lengths, self.fed)]
        if any(surplus):
            self.cache.forget(surplus)
        inputs = self.tokens.window(behind, ahead)
        self.fed = [length + ahead for length in lengths]
        return self._forward(inputs, keep)

    def step(self, newest: Tensor, keep: int = 1) -> Tensor:
        """Feed one more column [B, 1] to every row (inside a draft); logits as in :meth:`feed`."""
        self.fed = [fed + 1 for fed in self.fed]
        return self._forward(newest, keep)

    def _forward(self, inputs: Tensor, keep: int) -> Tensor:
        columns = inputs.shape[1]
        arguments = self._arguments(inputs, keep)
        logits = self.model(**arguments, past_key_values=self.past, use_cache=True, return_dict=True).logits
        self.cache.extended(columns)
        self.passes += 1
        return logits[:, -keep:, : self.vocab_size].float()

    def _arguments(self, inputs: Tensor, keep: int) -> dict[str, Any]:
        mask, positions = self._mask_and_positions(inputs)
        arguments: dict[str, Any] = {"logits_to_keep": keep} if self._takes_keep else {}
        if self.encoder is not None:
            return arguments | {
                "decoder_input_ids": inputs,
                "decoder_attention_mask": mask,
                "encoder_outputs": self._encoder_states,
                "attention_mask": self.encoder[1],
            }
        if self._takes_positions and positions is not None:
            arguments["position_ids"] = positions
        return arguments | {"input_ids": inputs, "attention_mask": mask}

    def _mask_and_positions(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not any(self.cache.pads):
            return None, None  # the model's own default, and the fastest path
        pads = torch.tensor(self.cache.pads, device=inputs.device)[:, None]
        columns = torch.arange(self.cache.width + inputs.shape[1], device=inputs.device)[None]
        positions = (columns[:, self.cache.width :] - pads).clamp_(min=0)
        return (columns >= pads).long(), positions

    def hidden(self, count: int) -> Tensor:
        """Hidden states [B, count, D] of the newest columns of the latest pass; needs a tap."""
        if self.tap is None:
            raise RuntimeError("hidden states were asked for without a tap")
        return self.tap.last(count)

    def keep_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Finished rows leave: cache, encoder states and masks."""
        self.cache.keep_rows(rows, index)
        self.fed = [self.fed[row] for row in rows]
        if self.encoder is None:
            return
        self.past.cross_attention_cache.batch_select_indices(index)
        states, mask = self.encoder
        self.encoder = states.index_select(0, index), None if mask is None else mask.index_select(0, index)
        self._encoder_states = BaseModelOutput(last_hidden_state=self.encoder[0])
