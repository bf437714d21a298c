"""Speculative cascades on transformers models: ``cascade_generate``, ``load_pair``, ``Pair``.

Names are loaded on first use: settings need neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deferral_train.errors import names_on_first_use

_HOME = {
    "CascadeOutput": "generate",
    "DecodeConfig": "settings",
    "Generation": "pair",
    "GenerationStats": "stats",
    "Pair": "pair",
    "Settings": "settings",
    "cascade_generate": "generate",
    "load_pair": "pair",
}

__all__ = [
    "CascadeOutput",
    "DecodeConfig",
    "Generation",
    "GenerationStats",
    "Pair",
    "Settings",
    "cascade_generate",
    "load_pair",
]

if TYPE_CHECKING:
    from deferral_train.decoding.generate import CascadeOutput, cascade_generate
    from deferral_train.decoding.pair import Generation, Pair, load_pair
    from deferral_train.decoding.settings import DecodeConfig, Settings
    from deferral_train.decoding.stats import GenerationStats


__getattr__ = names_on_first_use(__name__, _HOME)
