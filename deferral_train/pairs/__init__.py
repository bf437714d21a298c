"""Pairs: load and check a drafter and a verifier, read prompts, train a pair on text.

Names are loaded on first use: settings and prompts of a pair need neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"ModelPair": "load", "load_models": "load", "Prompt": "prompts", "read_prompts": "prompts"}

__all__ = ["ModelPair", "Prompt", "load_models", "read_prompts"]

if TYPE_CHECKING:
    from deferral_train.pairs.load import ModelPair, load_models
    from deferral_train.pairs.prompts import Prompt, read_prompts


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
