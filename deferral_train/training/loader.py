"""Batches as index blocks of preloaded columns. No row is ever collated.

The order is a function of (seed, epoch) alone, so that a run stopped in the middle of an epoch continues
with the very batches it had left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError

Table = Mapping[str, Tensor]  # columns with one shared first axis


def table_rows(table: Table) -> int:
    """Number of rows, the length of every column."""
    lengths = {len(column) for column in table.values()}
    if len(lengths) != 1:
        raise InputError(f"columns of a table must have one length, got {sorted(lengths)}")
    return lengths.pop()


class TableLoader:
    """Iterates over a table in batches; one permutation per epoch, or slices in order.

    Args:
        table: columns over N rows.
        batch_size: rows per batch and process.
        seed: of the permutations; None keeps the order and hands out slices.
        rank, world: this process takes every ``world``-th row from ``rank`` on. Shuffled rows are cut to
        equal
            shares, because every process must take the same number of steps; ordered rows are all kept.
        epoch: says which epoch it is, when an iteration starts.
    """

    def __init__(
        self,
        table: Table,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: use 1 or more")
        self.table, self.batch_size, self.seed = table, batch_size, seed
        self.rank, self.world, self.epoch = rank, world, epoch
        rows = table_rows(table)
        self.rows = rows // world if seed is not None else len(range(rank, rows, world))
        if seed is not None and self.rows == 0:
            raise InputError(f"{rows} rows for {world} processes; use fewer processes or more traces")
        self._epoch, self._done = -1, 0
        self._start: tuple[int, int] | None = None  # (epoch, first batch) of a resumed run

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch = self.epoch()
        # Kept until this iteration ends: a trainer may open an iterator more than once before it uses one.
        first = self._start[1] if self._start is not None and self._start[0] == epoch else 0
        first = first if first < len(self) else 0
        self._epoch = epoch
        order = self._order(epoch) if self.seed is not None else None
        for number in range(first, len(self)):
            self._done = number + 1
            yield self._batch(order, number * self.batch_size)
        self._start = None

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(self.seed or 0, epoch))
        shuffled = torch.randperm(table_rows(self.table), generator=generator)
        return shuffled[self.rank :: self.world][: self.rows]

    def _batch(self, order: Tensor | None, start: int) -> dict[str, Tensor]:
        stop = min(start + self.batch_size, self.rows)
        if order is not None:
            index = order[start:stop]
            return {name: column.index_select(0, index) for name, column in self.table.items()}
        rows = slice(self.rank + start * self.world, self.rank + (stop - 1) * self.world + 1, self.world)
        return {name: column[rows] for name, column in self.table.items()}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out in it; Lightning stores it with a checkpoint."""
        return {"epoch": self._epoch, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batches already handed out, if the next iteration is of the same epoch."""
        self._epoch, self._done = int(state["epoch"]), int(state["done"])
        self._start = (self._epoch, self._done)


def step_seed(seed: int, step: int) -> int:
    """A seed for the generator of one epoch or step, far from its neighbours'."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % (1 << 63)
