"""A drafter cut from a verifier that is there already: some of its layers, to be distilled on texts."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.pairs.load import load_model

ROLE = "from_verifier"  # what the model is called in messages
LAYER = re.compile(r"^(.*\blayers\.)(\d+)(\..*)$")


def layers_of(kept: Sequence[int], count: int) -> list[int]:
    """Numbers of the kept layers of ``count``, from 0; negative ones count from the end.

    Raises:
        InputError: none, one that is not there, out of order or twice, or all of them.
    """
    found = [number + count if number < 0 else number for number in kept]
    if not found or not all(0 <= number < count for number in found):
        raise InputError(
            f"kept_layers={list(kept)}: the verifier has layers 0 to {count - 1}; name some of them, such as "
            "0 1 2 3 -2 -1 (the first four and the last two)"
        )
    if found != sorted(set(found)) or len(found) == count:
        raise InputError(
            f"kept_layers={list(kept)}: name each layer once, in the verifier's order, and fewer than its {count}"
        )
    return found


def open_verifier(name: str | Path, dtype: str = "stored") -> Any:
    """The existing verifier on the CPU, in eval mode, without gradients.

    Args:
        name: a folder, a hub id or a ``.gguf`` file of a decoder-only model.
        dtype: of its weights, as :func:`~deferral_train.pairs.load.load_model` takes it.

    Raises:
        InputError: no checkpoint, or one that is not decoder-only.
    """
    model = load_model(name, ROLE, dtype)
    if model.config.is_encoder_decoder:
        raise InputError(f"{ROLE}: {name} is an encoder-decoder; give a decoder-only model")
    return model.requires_grad_(False)


def cut(verifier: Any, kept: Sequence[int]) -> Any:
    """A drafter of the kept layers, embeddings, final norm and output matrix of the verifier, its weights copied.

    Raises:
        InputError: layers that cannot be kept, or a model whose layers are not a list called ``layers``.
    """
    weights = verifier.state_dict()
    named = {match[1] for name in weights if (match := LAYER.match(name))}
    if len(named) != 1:
        raise InputError(
            f"from_verifier: {type(verifier).__name__} has {len(named)} lists of layers; a drafter is cut from one"
        )
    layers = layers_of(kept, int(verifier.config.num_hidden_layers))
    config = copy.deepcopy(verifier.config)
    config.num_hidden_layers = len(layers)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[number] for number in layers]
    places = {number: place for place, number in enumerate(layers)}
    chosen = {}
    for name, value in weights.items():
        match = LAYER.match(name)
        if match is None:
            chosen[name] = value
        elif int(match[2]) in places:
            chosen[f"{match[1]}{places[int(match[2])]}{match[3]}"] = value
    drafter = type(verifier)(config)
    drafter.load_state_dict(chosen)
    return drafter.to(next(verifier.parameters()).dtype)
