"""Traces: both models' token distributions, logged compactly. Knows nothing about how they are collected."""

from deferral_train.traces.candidates import Candidates, read_candidates
from deferral_train.traces.ledger import ChunkRecord
from deferral_train.traces.manifest import Chunk, Manifest
from deferral_train.traces.reader import Traces, open_traces
from deferral_train.traces.schema import SCHEMA_VERSION, Layout
from deferral_train.traces.splits import split_prompts
from deferral_train.traces.writer import TraceWriter, prepare_folder

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
