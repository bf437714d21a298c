"""The sizes that passes are built for, rounded so that few are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

SLACK = 4  # a built shape may be so many times larger, in any direction, than a call needs


@dataclass(frozen=True)
class Shape:
    """What a set of passes is built for.

    Attributes:
        slots, columns: S and C.
        states: E, encoder states of each slot, 0 for decoder-only models.
        backend: ``static`` for the model's own kernels, or a backend of ``torch.compile``.
        hidden: whether hidden states are read.
        passes: (W, k): columns that a pass takes in and the last of them whose logits it gives.
    """

    slots: int
    columns: int
    states: int
    backend: str
    hidden: bool
    passes: tuple[tuple[int, int], ...]

    @staticmethod
    def around(
        rows: int, columns: int, states: int, backend: str, hidden: bool, passes: Sequence[tuple[int, int]]
    ) -> Shape:
        """The least shape of the grid of powers of two that holds these sizes."""
        wide = _power(states, 32) if states else 0
        return Shape(_power(rows, 1), _power(columns, 128), wide, backend, hidden, tuple(passes))

    def serves(self, asked: Shape) -> bool:
        """Whether these passes do for what ``asked`` was made for: as large, but not wastefully larger."""
        sizes = ((one.slots, one.columns, one.states) for one in (self, asked))
        alike = replace(self, slots=0, columns=0, states=0) == replace(asked, slots=0, columns=0, states=0)
        return alike and all(need <= size <= SLACK * need for size, need in zip(*sizes))


def _power(least: int, start: int) -> int:
    size = start
    while size < least:
        size *= 2
    return size
