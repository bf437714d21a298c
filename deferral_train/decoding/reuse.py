"""The record of what a decode run was made from, ``run.json``: it decides whether its batches are taken up.

Settings alone do not say it: weights may be trained on in their folder, a head exported anew, a model changed in
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deferral_train import provenance
from deferral_train.decoding.decoder import Decoder
from deferral_train.decoding.settings import Settings
from deferral_train.heads.fingerprint import rule_key
from deferral_train.pairs.prompts import Prompt, filled
from deferral_train.rules.base import Rule


def identity(
    pair: Decoder,
    prompts: Sequence[Prompt],
    named: Mapping[str, Rule],
    settings: Settings,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """The record, as JSON-like values: equal records, equal outputs.

    Args:
        pair: what decodes.
        prompts: all of the run.
        named: rules by label.
        settings: of the decoding.
        more: other values that decide what is written, such as ``repetitions``.
    """
    described = settings.described() | {"stop": None if settings.stop is None else rule_key(settings.stop)}
    record = {
        "prompts": provenance.hash_of([list(filled(p)) for p in prompts]),
        "prompts_planned": len(prompts),
        "rules": {label: rule_key(rule) for label, rule in named.items()},
        "settings": described,
        **more,
        **pair.record(settings),
    }
    return dict(provenance.plain(record))
