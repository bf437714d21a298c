"""Collecting: run a pair over prompts and write traces. Lightning is the engine; see docs/trace_format.md."""

from deferral_train.collecting.api import collect
from deferral_train.collecting.config import CollectConfig

__all__ = ["CollectConfig", "collect"]
