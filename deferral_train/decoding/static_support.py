"""Which models can run in static shapes, and what users may ask for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deferral_train.decoding.facts import facts_of
from deferral_train.decoding.hidden import HiddenTap
from deferral_train.errors import InputError

BACKENDS = ("static", "inductor", "aot_eager", "eager")
COMPILE = ("auto", "off", *BACKENDS)


class NotStaticError(Exception):
    """Why a model's passes cannot have static shapes; one line."""


def check_name(compile: str) -> None:
    """Refuse what is none of :data:`COMPILE`.

    Raises:
        InputError: naming the value and those that are known.
    """
    if compile not in COMPILE:
        raise InputError(f"compile is {compile!r}; use one of {', '.join(COMPILE)}")


def check_compile(compile: str, models: Sequence[Any]) -> None:
    """Refuse an unknown backend, and a model that one was asked for and that cannot be run so.

    Raises:
        InputError: naming the value and the remedy.
    """
    check_name(compile)
    if compile in ("auto", "off"):
        return
    for model in models:
        reason = reason_against(model)
        if reason is not None:
            raise InputError(
                f"compile={compile!r}: {type(model).__name__} {reason}; use compile='auto' or 'off'"
            )


def reason_against(model: Any) -> str | None:
    """Why this model's passes cannot have static shapes, as far as one can tell without running it."""
    facts = facts_of(model)
    kinds = {
        kind.__name__
        for kind, _ in facts.cache_layers
        if kind not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    if kinds:
        return f"has cache layers of another kind ({', '.join(sorted(kinds))})"
    attention = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"uses {attention} attention, which takes no mask per row (load it with sdpa)"
    if len(set(getattr(model, "hf_device_map", None) or {"": 0})) > 1:
        return "is spread over several devices"
    if not facts.is_encoder_decoder and not facts.takes_positions:
        return "takes no positions per row"
    if facts.is_encoder_decoder and not hasattr(first_attention(model), "compute_bias"):
        return "is an encoder-decoder model of another kind than T5"
    windows = {window for _, window in facts.cache_layers}
    if len(windows) > 1 and not hasattr(model.config.get_text_config(decoder=True), "layer_types"):
        return "mixes attention windows without naming them"
    if torch.is_autocast_enabled(model.device.type):
        return "runs under autocast"
    return None


def first_attention(model: Any) -> Any:
    """T5's first self-attention layer, which holds the relative position bias of all of them; else None."""
    try:
        return model.get_decoder().block[0].layer[0].SelfAttention
    except (AttributeError, IndexError, TypeError):
        return None


def windows_of(model: Any) -> dict[str, int | None]:
    """The attention window of each type of layer, by the names that the model gives them; one entry named "" where
    all layers are alike.
    """
    windows = [window for _, window in facts_of(model).cache_layers]
    if len(set(windows)) == 1:
        return {"": windows[0]}
    return dict(zip(model.config.get_text_config(decoder=True).layer_types, windows))


# What adapters (peft's names) switch without touching weights; a recorded pass would go on as it was.
ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def identity_of(model: Any) -> tuple[Any, ...]:
    """What a built pass relies on: where weights and buffers lie, how attention is computed, adapters and hooks.

    Raises:
        NotStaticError: weights that lie nowhere.
    """
    config = model.config.get_text_config(decoder=True)
    try:
        lies = [one.data_ptr() for one in itertools.chain(model.parameters(), model.buffers())]
    except RuntimeError as error:
        raise NotStaticError("has weights without an address (offloaded or quantised)") from error
    return (
        hash(tuple(lies)),
        model.dtype,
        config._attn_implementation,
        torch.is_inference_mode_enabled(),
        model.training,
        tuple(_switches(model)),
    )


def _switches(model: Any) -> list[Any]:
    """States of adapters, and hooks that somebody has set."""
    found: list[Any] = []
    for module in model.modules():
        values = vars(module)
        found += [repr(values[name]) for name in ADAPTERS if name in values]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            # transformers sets its own at the first call and leaves them; taps are set per call.
            found += [
                key
                for key, hook in hooks.items()
                if not (isinstance(hook, HiddenTap) or str(hook.__module__).startswith("transformers."))
            ]
    return found
