"""Tables of rejected pairs for rule csd: counted from traces, one safetensors file that holds numbers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.rules.rejected_pairs import MOST_TOKENS, RejectedPairs
from deferral_train.traces import Traces

COLUMNS = ("drafted", "verifier", "counts")
KIND = "rejected_pairs"  # among the file's metadata
MOST_BYTES = 1 << 30


def count_rejections(traces: Sequence[Traces]) -> RejectedPairs:
    """Pairs of greedy tokens that differ, over all rows of traces of one pair of models.

    Raises:
        InputError: no traces, or traces of several pairs.
    """
    if not traces:
        raise InputError("traces is empty; name at least one folder")
    pair = dict(traces[0].manifest.pair)
    if any(dict(part.manifest.pair) != pair for part in traces):
        raise InputError("traces: the folders are of several pairs of models; count each pair by itself")
    drafted, verifier = (
        torch.cat([torch.as_tensor(part.column(name).copy()).long() for part in traces])
        for name in ("drafter_argmax", "verifier_argmax")
    )
    return RejectedPairs.counted(drafted, verifier, {"pair": pair})


def write_rejected_pairs(pairs: RejectedPairs, path: str | Path) -> None:
    """Write a table whole or not at all."""
    tensors = dict(zip(COLUMNS, (pairs.keys % MOST_TOKENS, pairs.keys // MOST_TOKENS, pairs.counts)))
    metadata = json.dumps(provenance.plain(pairs.metadata), sort_keys=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    plain = {name: one.cpu().contiguous() for name, one in tensors.items()}
    provenance.write_bytes(path, save(plain, metadata={KIND: metadata}))


def read_rejected_pairs(path: str | Path) -> RejectedPairs:
    """Read a table.

    Raises:
        InputError: no such file, or one that holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"table: {path} is no file; write one with `deferral-train count-rejections --out`")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(
            f"table: {path} is larger than {MOST_BYTES} bytes; this is no table of rejected pairs"
        )
    try:
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get(KIND)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = None if stated is None else json.loads(stated)
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise InputError(
            f"table: {path} is no readable safetensors file: {' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(metadata, Mapping) or set(tensors) != set(COLUMNS):
        raise InputError(
            f"table: {path} holds no table of rejected pairs; it has {', '.join(sorted(tensors))}"
        )
    return _made(path, tensors, metadata)


def _made(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> RejectedPairs:
    try:
        return RejectedPairs(tensors["drafted"], tensors["verifier"], tensors["counts"], metadata)
    except InputError as error:
        raise InputError(f"table: {path}: {error}") from None
