"""Collecting: run a pair over prompts and write traces. Lightning is the engine; see docs/trace_format.md.

Names are loaded on first use: settings need neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deferral_train.errors import names_on_first_use

_HOME = {"CollectConfig": "config", "collect": "api"}

__all__ = ["CollectConfig", "collect"]

if TYPE_CHECKING:
    from deferral_train.collecting.api import collect
    from deferral_train.collecting.config import CollectConfig


__getattr__ = names_on_first_use(__name__, _HOME)
