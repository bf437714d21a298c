"""Real trace folders of a small synthetic language, written through the public writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deferral_train.pairs.synthetic import (
    SyntheticConfig,
    SyntheticLanguage,
    build_language,
    chunks,
    sample_sequences,
)
from deferral_train.rules.summary import summarize
from deferral_train.traces import Chunk, Manifest, TraceWriter, prepare_folder
from deferral_train.traces.schema import SUMMARY_COLUMNS

SMALL = SyntheticConfig(vocab_size=12, order=2, verifier_order=2, drafter_order=1, drafter_scale=2.0)


def small_language(**changes: float) -> SyntheticLanguage:
    return build_language(SyntheticConfig(**{**SMALL.__dict__, **changes}))


def write_traces(
    folder: Path,
    language: SyntheticLanguage,
    sequences: int = 40,
    length: int = 25,
    seed: int = 0,
    top_k: int = 4,
    truth: bool = True,
    names: str = "s",
) -> Path:
    """Traces with the exact truth group over ``sequences`` texts of ``length`` tokens."""
    manifest = Manifest(
        pair={"drafter": "toy-q", "verifier": "toy-p", "tokenizer": "toy"},
        prefixes="reference",
        prompt_ids=tuple(f"{names}{seed}:{i}" for i in range(sequences)),
        chunks=(Chunk(0, seed, (tuple(range(sequences)),)),),
        top_k=top_k,
        truth="exact" if truth else None,
    )
    prepare_folder(str(folder), manifest)
    parts = [
        columns_of(part, top_k, truth)
        for part in chunks(language, sample_sequences(language, sequences, length, seed))
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    TraceWriter(str(folder), manifest).write(manifest.chunks[0], columns)
    return folder


def columns_of(part, top_k: int, truth: bool) -> dict[str, np.ndarray]:
    rows, length = part.gold.shape
    summary = summarize(part.drafter_logits, part.verifier_logits, token=part.gold)
    columns = {name: summary[name] for name in SUMMARY_COLUMNS}
    columns |= {name: summary[name] for name in ("token", "drafter_logprob", "verifier_logprob")}
    columns["gold"] = part.gold
    columns["prompt"] = torch.arange(part.first, part.first + rows).unsqueeze(1).expand(rows, length)
    columns["position"] = torch.arange(length).expand(rows, length)
    if truth:
        columns |= part.truth_columns()
    logs = {"drafter": part.drafter_logits.log_softmax(-1), "verifier": part.verifier_logits.log_softmax(-1)}
    for role, law in logs.items() if top_k else ():
        ids = law.topk(top_k, dim=-1).indices
        columns[f"{role}_top_ids"] = ids
        columns |= {f"{role}_top_{other}_logprobs": logs[other].gather(-1, ids) for other in logs}
        columns[f"{role}_tail"] = 1 - law.gather(-1, ids).exp().sum(-1)
    flat = {name: value.reshape(rows * length, *value.shape[2:]) for name, value in columns.items()}
    return {name: value.numpy() for name, value in flat.items()}
