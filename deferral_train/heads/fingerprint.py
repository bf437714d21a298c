"""Hashes of weights in memory and JSON-like keys of whole rules: equal keys, equal decisions.

Records of decoded outputs, of traces and of certificates name what they were made with by these.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deferral_train import provenance

SAMPLES = 4096  # numbers of each tensor of a large model


def weights_key(weights: Any) -> str:
    """Hash of a module's tensors by name, type, shape and bytes, whatever device they lie on.

    Above :data:`provenance.HASHED_BYTES` in all, of each tensor's size and ``SAMPLES`` evenly spread numbers.

    Args:
        weights: a module, or its state: names to tensors. What is no tensor there counts by its text.
    """
    state = weights if isinstance(weights, Mapping) else weights.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    whole = sum(t.numel() * t.element_size() for t in tensors.values()) <= provenance.HASHED_BYTES
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if name not in tensors:
            digest.update(f"{name}={value!r}".encode())
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if not value.is_meta:
            digest.update(_bytes_of(value.detach(), whole))
    return digest.hexdigest()[:32]


def _bytes_of(tensor: Tensor, whole: bool) -> bytes:
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    flat = tensor.reshape(-1)
    if not whole:
        flat = flat[:: max(1, flat.numel() // SAMPLES)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def rule_key(rule: Any) -> dict[str, Any]:
    """A rule, or a rule that stops drafting, as JSON-like values: class, parameters, the weights of its head.

    A class from outside of this package counts by its source file, too.
    """
    cls = type(rule)
    parameters = {
        item.name: _parameter(getattr(rule, item.name))
        for item in (fields(rule) if is_dataclass(rule) else ())
    }
    found = {"class": f"{cls.__module__}.{cls.__qualname__}", **parameters}
    if not cls.__module__.startswith("deferral_train."):
        found["source"] = _source(cls)
    return found


def _parameter(value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        found = {"class": type(value).__qualname__, "weights": weights_key(value)}
        if hasattr(value, "config") and isinstance(value.config, Mapping):
            found["config"] = provenance.hash_of(dict(value.config))
        estimator = getattr(value, "estimator", None)  # of a baseline that is no torch module
        return (
            found
            if estimator is None
            else {**found, "estimator": repr(sorted(vars(estimator).items(), key=str))}
        )
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return weights_key({"value": value})
    return repr(value)


def _source(cls: type) -> str | None:
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:  # made in a session
        return None
    return None if file is None or not Path(file).is_file() else provenance.content_key(file)
