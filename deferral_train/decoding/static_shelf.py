"""Built passes are kept with their model and lent to one call at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from deferral_train.decoding.compiled import StaticModel
from deferral_train.decoding.static_shape import Shape
from deferral_train.decoding.static_support import NotStaticError, identity_of

KEPT = 4  # built shapes kept per model


@dataclass
class _Shelf:
    """What has been built for a model and is not lent out, and what could not be built."""

    built: list[StaticModel] = field(default_factory=list)
    failed: dict[Shape, str] = field(default_factory=dict)


_SHELVES: WeakKeyDictionary[Any, _Shelf] = WeakKeyDictionary()
_LOCK = threading.Lock()  # calls in several threads take from the shelves and put back


def release_passes(*models: Any) -> None:
    """Free the passes that are kept for these models, or for all: their buffers and CUDA graphs, and what has failed.

    Passes that a running call has borrowed are kept again when it ends.
    """
    with _LOCK:
        for model in models or list(_SHELVES):
            _SHELVES.pop(model, None)


@contextlib.contextmanager
def lent(model: Any, shape: Shape, prove: Callable[[StaticModel], None]) -> Iterator[StaticModel]:
    """The passes of a model in this shape, built at the first call and lent to one call at a time.

    Args:
        prove: compares what has been built with the model itself.

    Raises:
        NotStaticError: it has been tried and does not work; remembered with the model.
    """
    static = _taken(model, shape) or _made(model, shape, prove)
    try:
        with static.hooked(model):
            yield static
    finally:
        with _LOCK:
            shelf = _SHELVES.setdefault(model, _Shelf())
            others = [one for one in shelf.built if not static.shape.serves(one.shape)]
            shelf.built = [*others, static][-KEPT:]


def _taken(model: Any, shape: Shape) -> StaticModel | None:
    """The least of those on the shelf that do; passes of another state of the model are dropped."""
    identity = identity_of(model)
    with _LOCK:
        shelf = _SHELVES.setdefault(model, _Shelf())
        shelf.built = [one for one in shelf.built if one.identity == identity]
        fitting = [one for one in shelf.built if one.shape.serves(shape)]
        static = min(fitting, key=lambda one: one.shape.slots * one.shape.columns, default=None)
        if static is not None:
            shelf.built.remove(static)
        elif shape in shelf.failed:
            raise NotStaticError(shelf.failed[shape])
        return static


def _made(model: Any, shape: Shape, prove: Callable[[StaticModel], None]) -> StaticModel:
    try:
        static = StaticModel(model, shape)
        with static.hooked(model):
            prove(static)
    except NotStaticError as error:
        with _LOCK:
            _SHELVES.setdefault(model, _Shelf()).failed[shape] = str(error)
        raise
    except torch.OutOfMemoryError as error:  # may fit another time
        raise NotStaticError(f"has no memory for {shape.slots} rows of {shape.columns} columns") from error
    return static
