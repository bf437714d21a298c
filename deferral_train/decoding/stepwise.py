"""A model whose cache cannot be rolled back row by row: it is read one token at a time, as its own ``generate`` does.

Recurrent and hybrid states, indexed or compressed caches, models without a cache. Every pass is the one that
``generate`` would make, over all rows of the call. Before a token that may be dropped the state is copied, and what was
fed behind a dropped token is forgotten by going back to a copy. Exact for any model, and as a verifier no faster than
the model alone: a block of T tokens costs T + 1 passes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import ALL_CACHE_NAMES

from deferral_train.decoding.cached_model import CachedModel

RENAMED = {"past_buckets_states": "past_key_values", "mems": "past_key_values"}  # as generate hands them on


class StepwiseModel(CachedModel):
    """Feeds a model one token of every row at a time; its running rows are of one length.

    Attributes:
        state: what the model remembers, by the name of its argument.
        seen: columns that the state has read; ``right`` of them hold what the rows still say.
        saved: (columns, copy of the state) where a rollback may go to, in order.
    """

    def start_over(self) -> None:
        """Forget everything, the copies too."""
        self.state: dict[str, Any] = {}
        self.core._prepare_cache_for_generation(
            GenerationConfig(use_cache=True), self.state, None, len(self.tokens.ids), 0
        )
        self.seen = self.right = 0
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self._states: list[Tensor] = []
        self._select_encoded()

    def feed(self, ahead: int = 0, keep: int = 1) -> Tensor:
        """As :meth:`CachedModel.feed`."""
        length = self.tokens.lengths[0]
        self._return_to(min(self.right, length + ahead - keep))
        return self._read(length + ahead, keep)

    def step(self, newest: Tensor, keep: int = 1) -> Tensor:
        """As :meth:`CachedModel.step`."""
        return self._read(self.seen + newest.shape[1], keep)

    def settle(self) -> None:
        """Rows have grown: what was fed beyond their newest token but one may have been replaced."""
        self.right = min([self.right, *(length - 1 for length in self.tokens.lengths)])

    def _read(self, end: int, keep: int) -> Tensor:
        """Logits [B, keep, V] of the last of ``end`` columns, reading on from where the state is."""
        found, length, self._states = [], self.tokens.lengths[0], []
        while self.seen < end:
            following = self.seen + 1 if self.seen else min(self.tokens.prompt_length, end - keep + 1)
            if self.seen >= length:  # behind the text: this column may be dropped
                self.saved.append((self.seen, _copied(self.state)))
            found.append(self._column(following))
            del found[:-keep]
        self.right = self.seen
        return torch.cat(found, dim=1)

    def _return_to(self, columns: int) -> None:
        """Go back to the latest state that has read no more than ``columns``."""
        while self.seen > columns:
            if not self.saved:
                self.start_over()
                break
            self.seen, self.state = self.saved.pop()
        self.saved.clear()  # whatever is older lies before the text that stands

    def _column(self, end: int) -> Tensor:
        """One pass as ``generate`` makes it, up to column ``end``; logits [B, 1, V] of the newest."""
        tokens, first = self.tokens, self.seen == 0
        given: dict[str, Any] = {name: table[..., :end] for name, table in self.inputs.columns.items()}
        given |= {**self._given(self._mask_up_to(end), keep=1), **self.state}
        prepared = self.core.prepare_inputs_for_generation(
            tokens.shown(end - tokens.lengths[0]),
            next_sequence_length=end - self.seen,
            is_first_iteration=first,
            **given,
        )
        output = self.model(**prepared, return_dict=True)
        for name in ALL_CACHE_NAMES:
            if name in output:
                self.state[RENAMED.get(name, name)] = output[name]
                break
        self.seen, self.passes = end, self.passes + 1
        if self.tap is not None:
            self._states.append(self.tap.last(1))
        return output.logits[:, -1:].index_select(0, tokens.index.to(output.logits.device)).float()

    def _mask_up_to(self, end: int) -> Tensor | None:
        """Which of the first ``end`` columns are tokens, [R, end]; ``generate`` gives a decoder none if all are."""
        if self.encoder is not None and not any(self.tokens.pads):
            return None
        pads = torch.tensor(self.tokens.pads, device=self.tokens.device)[:, None]
        return (torch.arange(end, device=self.tokens.device)[None] >= pads).long()

    def hidden(self, count: int) -> Tensor:
        """As :meth:`CachedModel.hidden`."""
        states = torch.cat(self._states[-count:], dim=1).to(self.tokens.device)
        return states.index_select(0, self.tokens.index)

    def _select_encoded(self) -> None:
        """All rows stay: a row that has ended is read on with padding, as in ``generate``."""
        self.encoder = self.inputs.encoder

    def keep_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Nothing leaves."""


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state that later passes do not write to."""
    return {name: copy.deepcopy(value) for name, value in state.items()}
