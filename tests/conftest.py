"""Shared fixtures: one thread per process, the shared real data where it is present."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from warm import Warm

torch.set_num_threads(1)

SHARED = Path(os.environ.get("DEFERRAL_TRAIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"real data not present: {folder} (set DEFERRAL_TRAIN_SHARED to its folder)")
    return folder


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Starts Python processes that have imported torch, transformers and Lightning already."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs fork and pidfd_open")
    started = Warm()
    yield started
    started.close()


@pytest.fixture(scope="session")
def multi30k() -> Path:
    """Multi30k En-De text (`{train,val,test_2016_flickr}.{en,de}.gz`); skips where absent."""
    return _present(SHARED / "data" / "multi30k")


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """GSM8K (`{train,test}.jsonl.gz`); skips where absent."""
    return _present(SHARED / "data" / "gsm8k")


@pytest.fixture(scope="session")
def t5_pair() -> Path:
    """Folder with `drafter/` and `verifier/`: T5 checkpoints trained on Multi30k; skips where absent."""
    return _present(SHARED / "models" / "multi30k-en-de")
