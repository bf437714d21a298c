"""A gap head's estimate for a few positions, in NumPy: what serving asks for at every block.

The dispatch of two dozen tensor operations outweighs the arithmetic of a small head. :meth:`DeferralHead.forward`
is the reference; the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deferral_train.heads.features import DERIVED
from deferral_train.rules.numbers import Numbers
from deferral_train.rules.summary import HIDDEN_FIELDS, Summary

if TYPE_CHECKING:
    from deferral_train.heads.base import DeferralHead

try:
    import numpy as np
except ImportError:  # a head runs where torch alone is installed
    np = None  # type: ignore[assignment]

MOST_ROWS = 1024  # beyond, torch's threads and kernels win
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
        and head.inputs.lookups is None
        and not HIDDEN_FIELDS & set(head.inputs.names)
        and all(transform in TRANSFORMS for transform, _ in head.inputs.groups)
        and isinstance(head.body, nn.Sequential)
        and all(isinstance(layer, nn.Linear | nn.SiLU) for layer in head.body.children())
        and head.mean.device.type == "cpu"
        and head.mean.dtype == torch.float32
        # Made in inference mode, weights do not tell when they change.
        and not any(one.is_inference() for one in (*head.parameters(), *head.buffers()))
    )


class _Plain:
    """A plain head laid out for NumPy: column groups and layers, normalisation folded into the first layer."""

    def __init__(self, head: DeferralHead) -> None:
        self.names = head.inputs.names
        self.gated = head.gated
        read = {feature.name for feature in head.inputs.features}
        self.columns = [(place, name) for place, name in enumerate(self.names) if name in read]
        self.groups = [(TRANSFORMS[t], _places(head.inputs.get_buffer(b))) for t, b in head.inputs.groups]
        linear = [layer for layer in head.body.children() if isinstance(layer, nn.Linear)]
        weights = [layer.weight.detach().double() for layer in linear]
        biases = [layer.bias.detach().double() for layer in linear]
        mean, scale = head.mean.double(), head.scale.double()
        weights[0] = weights[0] * scale
        biases[0] = biases[0] - weights[0] @ mean
        for place in range(len(weights) - 1):  # x SiLU'd is h (1 + tanh h) with h = x / 2
            weights[place], biases[place] = weights[place] / 2, biases[place] / 2
        self.layers = [(w.T.float().contiguous().numpy(), b.float().numpy()) for w, b in zip(weights, biases)]


def _places(columns: Tensor) -> Array:
    """Columns of a transform, as a slice where they lie together."""
    first, last = int(columns[0]), int(columns[-1])
    together = columns.tolist() == list(range(first, last + 1))
    return slice(first, last + 1) if together else columns.numpy()


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
    mean = head._buffers["mean"]
    if known is None or known.mean is not mean or [t._version for t in known.tensors] != known.versions:
        layout = _Plain(head) if is_plain(head) else None
        tensors = [] if layout is None else [*head.parameters(), *head.buffers()]
        known = _KNOWN[head] = _Known(head.mean, tensors, [t._version for t in tensors], layout)
    return known.layout


def known(head: DeferralHead) -> _Plain:
    """The layout that :func:`plain` has just found."""
    layout = _KNOWN[head].layout
    assert layout is not None
    return layout


def verify_stage_gap(head: _Plain, summary: Summary) -> Tensor:
    """The estimated gap ``[..]`` of a plain head whose body gives it alone."""
    columns = {
        name: (DERIVED[name].compute(summary) if name in DERIVED else summary[name]).numpy()
        for name in head.names
    }
    shape = columns[head.names[0]].shape
    flat = {name: column.reshape(-1) for name, column in columns.items()}
    gap = _body(head, _raw(head, flat))
    if head.gated:
        gap = gap * flat["argmaxes_differ"].astype(np.float32)
    return torch.from_numpy(_settled(gap).reshape(shape))


def gap_of_numbers(head: _Plain, numbers: Numbers) -> Array:
    """The same ``[N]`` from numbers of which only those are read that matter: a gated gap is 0 by definition where
    the argmaxes agree.
    """
    if not head.gated:
        return _settled(_body(head, _raw(head, numbers)))
    gap = np.zeros(numbers.shape, np.float32)
    differing = numbers.differing()
    if differing:
        some = numbers if len(differing) == len(gap) else numbers.only(differing)
        gap[differing] = _settled(_body(head, _raw(head, some)))
    return gap


def _raw(head: _Plain, columns: Mapping[str, Array]) -> Array:
    """Raw columns [N, C], of which those that the body does not read are left as they are."""
    raw = None
    for place, name in head.columns:
        column = columns[name] if name in columns else DERIVED[name].compute(columns)  # type: ignore[arg-type]
        if raw is None:
            raw = np.empty((len(column), len(head.names)), np.float32)
        raw[:, place] = column
    return raw


def _body(head: _Plain, raw: Array) -> Array:
    parts = [transform(raw[:, index]) for transform, index in head.groups]
    x = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    for place, (weight, bias) in enumerate(head.layers):
        if place:
            squashed = np.tanh(x)
            squashed += 1
            x *= squashed
        x = x @ weight
        x += bias
    return x[:, 0]


def _settled(gap: Array) -> Array:
    """What is no number defers."""
    if math.isfinite(sum(gap.tolist())):
        return gap
    return np.nan_to_num(gap, nan=np.inf, posinf=np.inf, neginf=-np.inf)
