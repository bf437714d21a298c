"""Real trace folders of a small synthetic language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deferral_train.collecting.synthetic import collect_synthetic
from deferral_train.pairs.synthetic import SyntheticConfig, SyntheticLanguage, build_language

SMALL = SyntheticConfig(vocab_size=12, order=2, verifier_order=2, drafter_order=1, drafter_scale=2.0)


def small_language(**changes: Any) -> SyntheticLanguage:
    return build_language(SyntheticConfig(**{**vars(SMALL), **changes}))


def write_traces(
    folder: Path,
    language: SyntheticLanguage,
    sequences: int = 40,
    length: int = 25,
    seed: int = 0,
    top_k: int = 4,
    truth: bool = True,
) -> Path:
    collect_synthetic(language, folder, sequences, length, seed=seed, top_k=top_k, truth=truth)
    return folder
