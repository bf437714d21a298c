"""Pairs: load and check a drafter and a verifier, read prompts, train a pair on text.

Names are loaded on first use: settings and prompts of a pair need neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deferral_train.errors import names_on_first_use

_HOME = {"ModelPair": "load", "load_models": "load", "Prompt": "prompts", "read_prompts": "prompts"}

__all__ = ["ModelPair", "Prompt", "load_models", "read_prompts"]

if TYPE_CHECKING:
    from deferral_train.pairs.load import ModelPair, load_models
    from deferral_train.pairs.prompts import Prompt, read_prompts


__getattr__ = names_on_first_use(__name__, _HOME)
