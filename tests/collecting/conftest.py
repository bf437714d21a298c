"""Tiny pairs and prompts of their words, in memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from deferral_train.pairs.load import ModelPair, make_pair
from deferral_train.pairs.prompts import Prompt


def _tiny_models() -> ModuleType:
    path = Path(__file__).parents[1] / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _tiny_models()


def make_prompts(count: int, seed: int = 0, longest: int = 14) -> list[Prompt]:
    """Prompts and references of random words, of lengths 1 to `longest`."""
    random = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(f"w{n}" for n in random.integers(0, len(tiny.WORDS), random.integers(1, longest + 1)))

    return [Prompt(f"q{n}", text(), text()) for n in range(count)]


def tiny_pair(kind: str, seed: int = 0, padded: int = 0) -> ModelPair:
    """A drafter that is sometimes right; `padded` more columns for the verifier's vocabulary."""
    drafter, verifier, tokenizer = tiny.tiny_pair(kind, seed)
    if padded:
        verifier = tiny.tiny_model(kind, seed, tiny.VOCAB + padded)
    return make_pair(drafter, verifier, tokenizer)


@pytest.fixture(scope="session")
def t5() -> ModelPair:
    return tiny_pair("t5")


@pytest.fixture(scope="session")
def llama() -> ModelPair:
    return tiny_pair("llama")
