"""Speculative cascades on transformers models: ``cascade_generate``, ``load_pair``, ``decode``."""

from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.generate import CascadeOutput, cascade_generate
from deferral_train.decoding.pair import Generation, Pair, load_pair
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.stats import GenerationStats

__all__ = [
    "CascadeOutput",
    "DecodeConfig",
    "Generation",
    "GenerationStats",
    "Pair",
    "Settings",
    "cascade_generate",
    "decode",
    "load_pair",
]
