"""A gap head's estimate for a few positions, in NumPy: what serving asks for at every block.

The dispatch of two dozen tensor operations outweighs the arithmetic of a small head. :meth:`DeferralHead.forward`
is the reference; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deferral_train.heads.features import DERIVED
from deferral_train.rules.summary import HIDDEN_FIELDS, Summary

if TYPE_CHECKING:
    from deferral_train.heads.base import DeferralHead

try:
    import numpy as np
except ImportError:  # a head runs where torch alone is installed
    np = None  # type: ignore[assignment]

MOST_ROWS = 1024  # beyond, torch's threads and kernels win
LARGE = 80.0  # exp of it is finite in float32; SiLU is 0 to rounding beyond
Array = Any

TRANSFORMS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "log": lambda x: np.log(np.maximum(x, np.float32(1e-10))),
    "log1p": lambda x: np.log1p(np.maximum(x, np.float32(0))),
    "logit": lambda x: _logit(np.clip(x, np.float32(1e-6), np.float32(1 - 1e-6))),
    "sqrt": lambda x: np.sqrt(np.maximum(x, np.float32(0))),
    "square": lambda x: x * x,
}


def _logit(x: Array) -> Array:
    return np.log(x / (1 - x))


def is_plain(head: DeferralHead) -> bool:
    """Whether the head reads scalars alone, through known transforms and layers, on a CPU in float32."""
    return (
        np is not None
        and head.recalibration.kind == "none"
        and head.inputs.memory is None
        and not HIDDEN_FIELDS & set(head.inputs.names)
        and all(transform in TRANSFORMS for transform, _ in head.inputs.groups)
        and isinstance(head.body, nn.Sequential)
        and all(isinstance(layer, nn.Linear | nn.SiLU) for layer in head.body.children())
        and head.mean.device.type == "cpu"
        and head.mean.dtype == torch.float32
    )


class _Plain:
    """A plain head laid out for NumPy: column groups and layers, normalisation folded into the first layer."""

    def __init__(self, head: DeferralHead) -> None:
        self.names = head.inputs.names
        self.gate = head.inputs.start["argmaxes_differ"] if head.gated else None
        self.groups = [(TRANSFORMS[t], head.inputs.get_buffer(b).numpy()) for t, b in head.inputs.groups]
        linear = [layer for layer in head.body.children() if isinstance(layer, nn.Linear)]
        weights = [layer.weight.detach().double() for layer in linear]
        biases = [layer.bias.detach().double() for layer in linear]
        mean, scale = head.mean.double(), head.scale.double()
        weights[0] = weights[0] * scale
        biases[0] = biases[0] - weights[0] @ mean
        self.layers = [(w.T.float().contiguous().numpy(), b.float().numpy()) for w, b in zip(weights, biases)]


@dataclass
class _Known:
    """A head's layout and the state of the weights that it was made from."""

    mean: Tensor
    tensors: list[Tensor]
    versions: list[int]
    layout: _Plain | None


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def plain(head: DeferralHead) -> _Plain | None:
    """The head laid out, once per state of its weights; None for one that is not plain."""
    known = _KNOWN.get(head)
    # A head moved or cast gets new buffers; weights written in place count a version up.
    if known is None or known.mean is not head.mean or [t._version for t in known.tensors] != known.versions:
        tensors = [*head.parameters(), *head.buffers()]
        layout = _Plain(head) if is_plain(head) else None
        known = _KNOWN[head] = _Known(head.mean, tensors, [t._version for t in tensors], layout)
    return known.layout


def verify_stage_gap(head: _Plain, summary: Summary) -> Tensor:
    """The estimated gap ``[..]`` of a plain head whose body gives it alone."""
    columns = [
        (DERIVED[name].compute(summary) if name in DERIVED else summary[name]).numpy() for name in head.names
    ]
    shape = columns[0].shape
    raw = np.stack([column.reshape(-1) for column in columns], axis=-1).astype(np.float32, copy=False)
    parts = [transform(raw[:, index]) for transform, index in head.groups]
    x = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    for place, (weight, bias) in enumerate(head.layers):
        if place:
            x /= 1 + np.exp(np.minimum(-x, LARGE))
        x = x @ weight + bias
    gap = x[:, 0] if head.gate is None else x[:, 0] * raw[:, head.gate]
    if not np.isfinite(gap).all():
        gap = np.nan_to_num(gap, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    return torch.from_numpy(gap.reshape(shape))
