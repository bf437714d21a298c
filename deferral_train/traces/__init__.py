"""Traces: both models' token distributions, logged compactly. Knows nothing about how they are collected.

Names are loaded on first use: settings need neither torch nor Arrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deferral_train.errors import names_on_first_use

_HOME = {
    "SCHEMA_VERSION": "schema",
    "Candidates": "candidates",
    "Chunk": "manifest",
    "ChunkRecord": "ledger",
    "Layout": "schema",
    "Manifest": "manifest",
    "TraceWriter": "writer",
    "Traces": "reader",
    "open_traces": "reader",
    "prepare_folder": "writer",
    "read_candidates": "candidates",
    "split_prompts": "splits",
}

__all__ = [
    "SCHEMA_VERSION",
    "Candidates",
    "Chunk",
    "ChunkRecord",
    "Layout",
    "Manifest",
    "TraceWriter",
    "Traces",
    "open_traces",
    "prepare_folder",
    "read_candidates",
    "split_prompts",
]

if TYPE_CHECKING:
    from deferral_train.traces.candidates import Candidates, read_candidates
    from deferral_train.traces.ledger import ChunkRecord
    from deferral_train.traces.manifest import Chunk, Manifest
    from deferral_train.traces.reader import Traces, open_traces
    from deferral_train.traces.schema import SCHEMA_VERSION, Layout
    from deferral_train.traces.splits import split_prompts
    from deferral_train.traces.writer import TraceWriter, prepare_folder


__getattr__ = names_on_first_use(__name__, _HOME)
