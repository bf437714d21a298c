"""Traces of the synthetic language, with the exact truth group: what studies of exact regret are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deferral_train import provenance
from deferral_train.collecting.measure import Measure
from deferral_train.pairs.synthetic import SyntheticChunk, SyntheticLanguage, chunks, sample_sequences
from deferral_train.traces import Chunk, Manifest, Traces, TraceWriter, open_traces, prepare_folder

CHUNK_SEQUENCES = 1024


def collect_synthetic(
    language: SyntheticLanguage,
    out: str | Path,
    sequences: int,
    length: int,
    *,
    seed: int = 0,
    top_k: int = 16,
    truth: bool = True,
) -> Traces:
    """Write traces of ``sequences`` texts of ``length`` tokens drawn from the source; finishes what is there.

    Args:
        seed: of the texts; prompt ids are ``synthetic-<seed>:<number>``, so folders of two seeds share none.
        top_k: K, logged candidates of each model.
        truth: log P's expectations as well.
    """
    texts = sample_sequences(language, sequences, length, seed)
    manifest = _manifest(language, sequences, length, seed, min(top_k, language.config.vocab_size), truth)
    for chunk in prepare_folder(str(out), manifest):
        numbers = chunk.prompts
        parts = [
            _columns(part, numbers[0], manifest.top_k, truth) for part in chunks(language, texts[numbers])
        ]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        TraceWriter(str(out), manifest).write(chunk, columns)
    return open_traces(out)


def _manifest(
    language: SyntheticLanguage, sequences: int, length: int, seed: int, top_k: int, truth: bool
) -> Manifest:
    config = dict(vars(language.config))
    starts = range(0, sequences, CHUNK_SEQUENCES)
    work = [tuple(range(start, min(start + CHUNK_SEQUENCES, sequences))) for start in starts]
    names = {role: f"synthetic-{role}-{provenance.hash_of(config)}" for role in ("drafter", "verifier")}
    ids = tuple(f"synthetic-{seed}:{number}" for number in range(sequences))
    return Manifest(
        pair={**names, "vocab_size": language.config.vocab_size},
        prefixes="reference",
        prompt_ids=ids,
        prompt_hashes=tuple(
            provenance.hash_of([config, name]) for name in ids
        ),  # a drawn sequence is its place
        chunks=tuple(Chunk(number, seed, (prompts,)) for number, prompts in enumerate(work)),
        top_k=top_k,
        truth="exact" if truth else None,
        seed=seed,
        settings={"language": config, "length": length},
        provenance=provenance.collect({"seed": seed, "language": language.config.seed}),
    )


def _columns(part: SyntheticChunk, first: int, top_k: int, truth: bool) -> dict[str, np.ndarray]:
    """Columns of the rows of a chunk, flat over (sequence, position)."""
    count, length = part.gold.shape
    logits = [each.reshape(count * length, -1) for each in (part.drafter_logits, part.verifier_logits)]
    gold = part.gold.flatten()
    measure = Measure(logits[0].shape[1], top_k)
    columns = measure(logits[0], logits[1], torch.arange(len(gold)), gold)
    del columns["finite"]  # the distributions of a table are
    columns["gold"] = gold
    columns["prompt"] = torch.arange(first + part.first, first + part.first + count).repeat_interleave(length)
    columns["position"] = torch.arange(length).repeat(count)
    columns |= {name: values.flatten() for name, values in part.truth_columns().items()} if truth else {}
    return {name: values.numpy() for name, values in columns.items()}
