"""Trainable layers of a head, from normalised features ``[N, F]`` to its raw outputs ``[N, O]``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from deferral_train.errors import InputError

BODIES = ("linear", "mlp")
MAX_LAYERS = 16
MAX_PARAMETERS = 50_000_000


def make_body(kind: str, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64)) -> nn.Module:
    """A linear map, or an MLP with SiLU between layers of the given widths.

    The last layer starts at zero, so that an untrained head predicts no gap rather than noise. Sizes are
    checked before anything is allocated.
    """
    if kind not in BODIES:
        raise InputError(f"body {kind!r} is unknown; choose one of: {', '.join(BODIES)}")
    widths = [inputs, *(hidden if kind == "mlp" else ()), outputs]
    _check_sizes(widths)
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.SiLU()]
    last = layers[-2]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers[:-1])


def _check_sizes(widths: Sequence[int]) -> None:
    if any(not isinstance(w, int) or w < 1 for w in widths):
        raise InputError(f"hidden widths must be positive integers, got {list(widths[1:-1])}")
    if len(widths) > MAX_LAYERS:
        raise InputError(f"{len(widths) - 1} layers in a body; at most {MAX_LAYERS - 1} are allowed")
    size = sum((i + 1) * o for i, o in pairwise(widths))
    if size > MAX_PARAMETERS:
        raise InputError(f"a body of {size} parameters; at most {MAX_PARAMETERS} are allowed")
