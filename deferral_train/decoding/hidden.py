"""Last hidden states of a model, read through hooks that are always taken off again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class HiddenTap:
    """Holds what the decoder's last layer put out in the latest forward pass: ``states`` [B, k, D]."""

    def __init__(self) -> None:
        self.states: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.states = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def last(self, count: int) -> Tensor:
        """States of the newest ``count`` columns, [B, count, D], in float32."""
        if self.states is None:
            raise RuntimeError("no forward pass has run under this tap")
        return self.states[:, -count:].float()


@contextlib.contextmanager
def tap_hidden(model: Any, wanted: bool = True) -> Iterator[HiddenTap | None]:
    """Record the decoder's output (after its final norm, ``hidden_states[-1]``) of each pass; None if not
    wanted.

    The hook is removed on leaving, also when an error leaves.
    """
    if not wanted:
        yield None
        return
    tap = HiddenTap()
    handle = model.get_decoder().register_forward_hook(tap)
    try:
        yield tap
    finally:
        handle.remove()
