"""Speculative cascades on transformers models: ``cascade_generate``, ``load_pair`` and what they are made of."""

from deferral_train.decoding.generate import CascadeOutput, cascade_generate
from deferral_train.decoding.stats import GenerationStats

__all__ = ["CascadeOutput", "GenerationStats", "cascade_generate"]
