"""What is asked of a model again and again, looked up once: reading a configuration copies all of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers.cache_utils import DynamicCache


@dataclass(frozen=True)
class ModelFacts:
    """Unchanging facts about a model.

    Attributes:
        is_encoder_decoder: whether it has an encoder.
        vocab_size: columns of its logits.
        context: most positions it was built for, None where positions are relative only.
        cache_layers: the type of each layer's cache and its sliding window, None where it has none.
        takes_positions: whether positions can be given per row.
        takes_keep: whether it can compute the logits of the last columns alone.
        relative_positions: whether attention depends on distances alone, computed from columns.
    """

    is_encoder_decoder: bool
    vocab_size: int
    context: int | None
    cache_layers: tuple[tuple[type, int | None], ...]
    takes_positions: bool
    takes_keep: bool
    relative_positions: bool


_KNOWN: WeakKeyDictionary[Any, ModelFacts] = WeakKeyDictionary()


def facts_of(model: Any) -> ModelFacts:
    """The facts of a transformers model."""
    if model not in _KNOWN:
        _KNOWN[model] = _look_up(model)
    return _KNOWN[model]


def _look_up(model: Any) -> ModelFacts:
    decoder = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=decoder).layers
    parameters = inspect.signature(model.forward).parameters
    return ModelFacts(
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        context=getattr(decoder, "max_position_embeddings", None),
        cache_layers=tuple((type(layer), getattr(layer, "sliding_window", None)) for layer in layers),
        takes_positions="position_ids" in parameters,
        takes_keep="logits_to_keep" in parameters,
        relative_positions=hasattr(model.config, "relative_attention_num_buckets"),
    )
