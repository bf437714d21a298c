"""Training batches as a pure function of (seed, step), so that an interrupted training continues exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.pairs.padding import IGNORED, answered, pad


class Batches(Protocol):
    """``batch(step)`` is keyword arguments of a model's forward (``input_ids``, ``labels``, ...)."""

    def batch(self, step: int) -> dict[str, Any]: ...


class WindowBatches:
    """Windows of ``context`` tokens from one stream of texts; every epoch is a new order of all windows.

    A window's labels are the tokens that follow each position: ``input_ids`` and ``labels`` are [B, context].
    """

    def __init__(self, stream: Tensor, context: int, size: int, seed: int) -> None:
        count = (len(stream) - 1) // context
        if count < 1:
            raise InputError(
                f"text: {len(stream)} tokens are less than one context of {context}; give more text"
            )
        self.inputs = stream[: count * context].view(count, context)
        self.targets = stream[1 : count * context + 1].view(count, context)
        self.size, self.seed = size, seed

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = torch.tensor([self._row(step * self.size + i) for i in range(self.size)])
        return {"input_ids": self.inputs[rows].long(), "labels": self.targets[rows].long()}

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, len(self.inputs))
        return int(_order(len(self.inputs), self.seed, epoch)[within])


class PairBatches:
    """Padded batches [B, longest] of (source, target) pairs, of similar length within a batch."""

    def __init__(
        self, sources: Sequence[list[int]], targets: Sequence[list[int]], pad_id: int, size: int, seed: int
    ) -> None:
        self.sources, self.targets = sources, targets
        self.pad_id, self.size, self.seed = pad_id, size, seed
        self.per_epoch = max(1, len(sources) // size)
        self._planned: tuple[int, list[list[int]]] | None = None

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self._rows(step)
        input_ids = pad([self.sources[i] for i in rows], self.pad_id)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != self.pad_id).long(),
            "labels": pad([self.targets[i] for i in rows], IGNORED),
        }

    def _rows(self, step: int) -> list[int]:
        """Indices of the pairs of a step's batch."""
        epoch, within = divmod(step, self.per_epoch)
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1][within]

    def _plan(self, epoch: int) -> list[list[int]]:
        """Shuffle, sort by length within stretches of 50 batches, shuffle the batches."""
        order = _order(len(self.sources), self.seed, epoch).tolist()
        stretch = 50 * self.size
        batches = []
        for start in range(0, len(order), stretch):
            alike = sorted(
                order[start : start + stretch], key=lambda i: (len(self.sources[i]), len(self.targets[i]))
            )
            batches += [alike[at : at + self.size] for at in range(0, len(alike), self.size)]
        shuffled = _order(len(batches), self.seed + 1, epoch).tolist()
        return [batches[i] for i in shuffled]


class AnswerBatches(PairBatches):
    """The same for one decoder: prompt and answer follow each other, and the answer alone is learned.

    Padding stands behind everything that is learned, so that causal attention needs no mask for it. ``labels``
    [B, K] are those of the last K places, the only ones that the model computes logits for.
    """

    def batch(self, step: int) -> dict[str, Any]:
        rows = self._rows(step)
        inputs, labels = zip(*(answered(self.sources[i], self.targets[i]) for i in rows))
        asked = min(len(self.sources[i]) for i in rows) - 1  # so many places have no label in any row
        wanted = pad(labels, IGNORED)[:, asked:].contiguous()
        return {
            "input_ids": pad(inputs, self.pad_id),
            "labels": wanted,
            "logits_to_keep": wanted.shape[1],
        }


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)
