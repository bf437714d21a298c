"""The drafter's logits (and hidden states) at every drafted position of the last step, kept by request.

The engine keeps the drafter's probabilities only for batches with sampling, and gives all of them up when one row has
none. Here each row has its own, greedy ones included. B requests, k drafted positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Proposals:
    """Buffer of the drafter's logits of the last drafted blocks.

    Args:
        hidden: keep the drafter's hidden states too.
    """

    def __init__(self, hidden: bool = False) -> None:
        self.hidden = hidden
        self.open = False
        self._steps: list[Tensor] = []
        self._hidden_steps: list[Tensor] = []
        self._rows: dict[str, int] = {}

    def begin(self, wanted: bool) -> None:
        """Clear the buffer before the drafter runs; ``wanted`` says if this step is to be kept."""
        self._steps, self._hidden_steps, self._rows = [], [], {}
        self.open = wanted

    def add(self, logits: Tensor, hidden: Tensor) -> None:
        """Keep one drafted position of every request: logits [B, V], hidden states [B, D]."""
        self._steps.append(logits)
        if self.hidden:
            self._hidden_steps.append(hidden.clone())  # the engine's own memory, used again

    def finish(self, names: Sequence[str]) -> None:
        """Close the step after the drafter ran; ``names`` are the request ids in its order of rows."""
        self.open = False
        if any(len(step) < len(names) for step in self._steps):
            self._steps = []
        self._rows = {name: row for row, name in enumerate(names)}

    def take(self, names: Sequence[str], drafts: int) -> tuple[Tensor | None, Tensor | None, list[bool]]:
        """Logits [R, T, V] and hidden states [R, T, D] of some requests, and which of them have any."""
        rows = [self._rows.get(name, -1) for name in names]
        have = [row >= 0 for row in rows]
        if len(self._steps) < drafts or not any(have):
            return None, None, [False] * len(names)
        at = None
        if rows != list(range(len(self._rows))):
            at = torch.tensor([max(row, 0) for row in rows], device=self._steps[0].device)

        def block(steps: list[Tensor]) -> Tensor:
            every = steps[:drafts]
            return torch.stack(
                [step[: len(rows)] if at is None else step.index_select(0, at) for step in every], dim=1
            )

        return block(self._steps), block(self._hidden_steps) if self._hidden_steps else None, have
