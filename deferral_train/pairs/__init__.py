"""Pairs: load and check a drafter and a verifier, read prompts, train a pair on text."""

from deferral_train.pairs.load import ModelPair, load_models
from deferral_train.pairs.prompts import Prompt, read_prompts

__all__ = ["ModelPair", "Prompt", "load_models", "read_prompts"]
