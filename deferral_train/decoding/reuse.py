"""The record of what a decode run was made from, ``run.json``: it decides whether its batches are taken up.

Settings alone do not say it: weights may be trained on in their folder, a head exported anew, a model changed in
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deferral_train import provenance
from deferral_train.decoding.pair import Pair, Settings
from deferral_train.heads.fingerprint import rule_key, weights_key
from deferral_train.pairs.fingerprint import tokenizer_fingerprint
from deferral_train.pairs.prompts import Prompt, filled
from deferral_train.rules.base import Rule


def identity(
    pair: Pair,
    prompts: Sequence[Prompt],
    named: Mapping[str, Rule],
    settings: Settings,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """The record, as JSON-like values: equal records, equal outputs.

    Args:
        pair: models as they are in memory; where they lie does not matter, their device does, since times are measured.
        prompts: all of the run.
        named: rules by label.
        settings: of the decoding.
        more: other values that decide what is written, such as ``repetitions``.
    """
    described = settings.described() | {"stop": None if settings.stop is None else rule_key(settings.stop)}
    models = {"drafter": pair.models.drafter, "verifier": pair.models.verifier}
    models |= {f"smaller.{place}": model for place, model in enumerate(pair.smaller)}
    record = {
        "prompts": provenance.hash_of([list(filled(p)) for p in prompts]),
        "prompts_planned": len(prompts),
        "rules": {label: rule_key(rule) for label, rule in named.items()},
        "settings": described,
        **more,
        "pair": pair.models.fingerprints,
        "models": {role: _model_key(model) for role, model in models.items()},
        "tokenizer": tokenizer_fingerprint(pair.tokenizer),
        "conditions": pair.facts(settings) | {"device": pair.models.device.type},
    }
    return dict(provenance.plain(record))


def _model_key(model: Any) -> dict[str, Any]:
    """Weights of a model in memory, and what of its configuration changes texts."""
    generation = getattr(model, "generation_config", None)
    return {
        "weights": weights_key(model),
        "attention": getattr(model.config, "_attn_implementation", None),
        "generation": None if generation is None else provenance.hash_of(generation.to_diff_dict()),
    }
