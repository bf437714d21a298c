"""Small trace folders with known values, written by the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deferral_train.traces import Chunk, Manifest, TraceWriter, prepare_folder
from deferral_train.traces.schema import width

PROMPTS = 9
CHUNK = 3


def make_manifest(**changes: Any) -> Manifest:
    """Nine prompts in three chunks, top 4 of each model, the drafter's hidden state, teacher-forced."""
    chunks = tuple(Chunk(n, 10 + n, ((3 * n + 2,), (3 * n, 3 * n + 1))) for n in range(PROMPTS // CHUNK))
    settings: dict[str, Any] = {
        "pair": {"drafter": {"weights": "aa", "name": "small"}, "verifier": {"weights": "bb"}},
        "prefixes": "reference",
        "prompt_ids": tuple(f"p{n}" for n in range(PROMPTS)),
        "chunks": chunks,
        "temperature": 0.5,
        "top_k": 4,
        "hidden": {"drafter": 8},
    }
    return Manifest(**{**settings, **changes})


def make_columns(manifest: Manifest, chunk: Chunk) -> dict[str, np.ndarray]:
    """Random values of every column; prompt n has n + 1 positions."""
    random = np.random.default_rng(chunk.seed)
    prompts = np.concatenate([np.full(n + 1, n) for n in chunk.prompts])
    columns = {
        name: random.random((len(prompts), width(kind)) if width(kind) > 1 else len(prompts)) * 5
        for name, kind in manifest.layout.columns.items()
    }
    columns["prompt"] = prompts
    columns["position"] = np.concatenate([np.arange(n + 1) for n in chunk.prompts])
    columns["token"] = columns["gold"] = np.floor(columns["gold"])
    columns["drafter_logprob"], columns["verifier_logprob"] = (
        -columns["drafter_logprob"],
        -columns["verifier_logprob"],
    )
    return columns


def write_folder(folder: Path | str, manifest: Manifest) -> dict[str, np.ndarray]:
    """Collect what is left to do into a folder; returns all columns that the whole folder should hold."""
    writer = TraceWriter(str(folder), manifest)
    for chunk in prepare_folder(str(folder), manifest):
        writer.write(chunk, make_columns(manifest, chunk))
    parts = [make_columns(manifest, chunk) for chunk in manifest.chunks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture
def manifest() -> Manifest:
    return make_manifest()


@pytest.fixture
def folder(tmp_path: Path, manifest: Manifest) -> Path:
    write_folder(tmp_path / "traces", manifest)
    return tmp_path / "traces"
