"""What the drafter thought when it drafted: its logits at every drafted position, by request.

The engine keeps the drafter's probabilities only for batches with sampling, and gives all of them up when one row has
none. Here each row has its own, greedy ones included. B requests, k drafted positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Proposals:
    """Logits of the last drafted blocks.

    Args:
        hidden: keep the drafter's hidden states too.
    """

    def __init__(self, hidden: bool = False) -> None:
        self.hidden = hidden
        self.open = False
        self._steps: list[Tensor] = []
        self._hidden_steps: list[Tensor] = []
        self._rows: dict[str, int] = {}
        self._laws: Tensor | None = None  # [B, k, V]
        self._states: Tensor | None = None  # [B, k, D]

    def begin(self, wanted: bool) -> None:
        """Before the drafter runs; what was kept of the step before is gone."""
        self._steps, self._hidden_steps, self._rows = [], [], {}
        self._laws, self._states, self.open = None, None, wanted

    def add(self, logits: Tensor, hidden: Tensor) -> None:
        """One drafted position of every request: logits [B, V], hidden states [B, D]."""
        self._steps.append(logits)
        if self.hidden:
            self._hidden_steps.append(hidden)

    def finish(self, names: Sequence[str]) -> None:
        """After the drafter ran, for the requests in its order of rows."""
        self.open = False
        if not self._steps or any(len(step) < len(names) for step in self._steps):
            return
        self._rows = {name: row for row, name in enumerate(names)}
        self._laws = torch.stack([step[: len(names)] for step in self._steps], dim=1)
        if self._hidden_steps:
            self._states = torch.stack([step[: len(names)] for step in self._hidden_steps], dim=1)
        self._steps, self._hidden_steps = [], []

    def take(self, names: Sequence[str], drafts: int) -> tuple[Tensor | None, Tensor | None, list[bool]]:
        """Logits [R, T, V] and hidden states [R, T, D] of some requests, and which of them have any."""
        rows = [self._rows.get(name, -1) for name in names]
        have = [row >= 0 for row in rows]
        if self._laws is None or self._laws.shape[1] < drafts or not any(have):
            return None, None, [False] * len(names)
        if rows == list(range(self._laws.shape[0])):
            return self._laws[:, :drafts], None if self._states is None else self._states[:, :drafts], have
        at = torch.tensor([max(row, 0) for row in rows], device=self._laws.device)
        states = None if self._states is None else self._states.index_select(0, at)[:, :drafts]
        return self._laws.index_select(0, at)[:, :drafts], states, have
