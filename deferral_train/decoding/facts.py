"""Facts about a model that decide how it is fed: vocabulary, context, cache layers, arguments of its forward pass."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from deferral_train.pairs.positions import PositionLimits, room_of

# Model types whose caches look like others' and are not.
ONE_AT_A_TIME = {
    "prophetnet": "its decoder takes one token behind a cache",
    "cpmant": "its cache begins with a prompt of its own",
    "git": "its mask behind a cache counts the tokens of an image",
    "paligemma": "its first pass reads in both directions, so that it must be the prompt's",
}
# Model types that count positions over the tokens of a pass, without the padding id, however it came there.
COUNTS_TOKENS = frozenset(
    {
        "fsmt",
        "kosmos-2",
        "kosmos-2.5",
        "m2m_100",
        "nllb-moe",
        "seamless_m4t",
        "seamless_m4t_v2",
        "speech_to_text",
    }
    | {"trocr"}
)
# Model types whose passes cannot be taken back at all.
STATE_IN_MODULES = frozenset({"recurrent_gemma"})


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model, read from the model itself and not from what wraps it.

    Attributes:
        name: its class.
        is_encoder_decoder: whether it has an encoder.
        vocab_size: columns of its logits.
        room: most tokens that it can place in a prompt of its encoder and in a text.
        cache_layers: the type of each layer's cache and its sliding window, None where it has none.
        takes: names of the arguments of its forward pass.
        takes_positions: whether positions can be given per row: some classes drop them while they prepare a pass.
        relative_positions: whether attention depends on distances alone, computed from columns.
        uncounted: an id behind which a pass of several tokens has other positions than passes of one; None for none.
        irrevocable: whether it keeps state in its own modules, where none can be put back.
        stepwise: why it must be read one token at a time, in words; None where blocks and rollbacks work.
        long_rope: tokens from which it rotates with its long factors (rope type longrope); None where it has none.
    """

    name: str
    is_encoder_decoder: bool
    vocab_size: int
    room: PositionLimits
    cache_layers: tuple[tuple[type, int | None], ...]
    takes: frozenset[str]
    takes_positions: bool
    relative_positions: bool
    uncounted: int | None
    irrevocable: bool
    stepwise: str | None
    long_rope: int | None

    @property
    def context(self) -> int | None:
        """Most tokens of a text, None where positions are relative only."""
        return self.room.text

    @property
    def aligns_right(self) -> bool:
        """True where every row may sit at an offset of its own: positions per row, or relative ones only."""
        return self.relative_positions if self.is_encoder_decoder else self.takes_positions


def core_of(model: Any) -> Any:
    """The transformers model inside wrappers: of ``torch.compile``, of PEFT adapters that live in its layers."""
    model = getattr(model, "_orig_mod", model)
    adapted = getattr(model, "get_base_model", None)
    return adapted() if callable(adapted) and hasattr(model, "peft_config") else model


def facts_of(model: Any) -> ModelFacts:
    """Facts of a transformers model as it is now: an embedding may have been resized since the last call."""
    core = core_of(model)
    decoder = core.config.get_text_config(decoder=True)
    layers = DynamicCache(config=decoder).layers
    kinds = tuple((type(layer), getattr(layer, "sliding_window", None)) for layer in layers)
    takes = frozenset(inspect.signature(type(core).forward).parameters)
    return ModelFacts(
        name=type(core).__name__,
        is_encoder_decoder=bool(core.config.is_encoder_decoder),
        vocab_size=_columns(core, decoder),
        room=room_of((core,)),
        cache_layers=kinds,
        takes=takes,
        takes_positions="position_ids" in takes and _positions_arrive(core),
        relative_positions=hasattr(core.config, "relative_attention_num_buckets"),
        uncounted=decoder.pad_token_id if core.config.model_type in COUNTS_TOKENS else None,
        irrevocable=core.config.model_type in STATE_IN_MODULES,
        stepwise=_stepwise(core, kinds, takes),
        long_rope=_long_rope(decoder),
    )


def _positions_arrive(core: Any) -> bool:
    """True where positions that are given are among the arguments that the model prepares for a pass."""
    prepare = getattr(core, "prepare_inputs_for_generation", None)
    if prepare is None or core.config.is_encoder_decoder:
        return True
    ids = torch.zeros(1, 2, dtype=torch.long, device=core.device)
    positions = torch.arange(2, device=core.device)[None]
    given = prepare(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=True)
    return given.get("position_ids") is not None


def _stepwise(core: Any, layers: tuple[tuple[type, int | None], ...], takes: frozenset[str]) -> str | None:
    """Why a model must be read one token at a time, or None."""
    if (reason := ONE_AT_A_TIME.get(core.config.model_type)) is not None:
        return reason
    if "past_key_values" not in takes:
        return "keeps no key/value cache"
    other = next((kind for kind, _ in layers if kind not in (DynamicLayer, DynamicSlidingWindowLayer)), None)
    if other is not None:
        return f"its {other.__name__} cannot be rolled back row by row"
    slides = any(kind is DynamicSlidingWindowLayer for kind, _ in layers)
    if slides and not any(_masks_windows(name) for name in {type(one).__module__ for one in core.modules()}):
        return "its window is kept by the cache alone, not by the mask of a block"
    return None


def _masks_windows(module: str) -> bool:
    """True for a module of models that makes masks of sliding windows."""
    return hasattr(sys.modules.get(module), "create_sliding_window_causal_mask")


def _columns(core: Any, decoder: Any) -> int:
    """Columns of the logits. Quantised layers give their weight by a method, or packed in another shape."""
    head = core.get_output_embeddings()
    weight = getattr(head, "weight", None)
    weight = weight() if callable(weight) else weight
    for found in (getattr(head, "out_features", None), getattr(head, "num_embeddings", None)):
        if isinstance(found, int):
            return found
    return int(decoder.vocab_size if weight is None else weight.shape[0])


def _long_rope(decoder: Any) -> int | None:
    given = getattr(decoder, "rope_parameters", None) or {}
    kinds = [given, *(one for one in given.values() if isinstance(one, dict))]
    lengths = [one["original_max_position_embeddings"] for one in kinds if one.get("rope_type") == "longrope"]
    return min(lengths) if lengths else None
