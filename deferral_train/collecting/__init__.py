"""Collecting: run a pair over prompts and write traces. Lightning is the engine; see docs/trace_format.md.

Names are loaded on first use: settings need neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"CollectConfig": "config", "collect": "api"}

__all__ = ["CollectConfig", "collect"]

if TYPE_CHECKING:
    from deferral_train.collecting.api import collect
    from deferral_train.collecting.config import CollectConfig


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
