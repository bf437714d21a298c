"""The columns of a trace row, as Arrow fields. The contract of docs/trace_format.md in code.

Knows nothing about files. One row is one position of one prompt; N rows, K logged candidates, D hidden width.
The names of the summary columns are fixed here, apart from ``rules.summary``: a file format changes only with
its version (a test compares the two lists).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deferral_train.errors import InputError

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)  # the current one and the one before
RELEASES = {1: "0.1", 2: "0.2"}  # schema version -> first release of deferral-train that reads it

INDEX_COLUMNS = ("prompt", "position", "gold")
TOKEN_COLUMNS = ("token", "drafter_logprob", "verifier_logprob")
SUMMARY_COLUMNS = (
    "drafter_max",
    "verifier_max",
    "drafter_argmax",
    "verifier_argmax",
    "drafter_at_verifier_argmax",
    "verifier_at_drafter_argmax",
    "drafter_entropy",
    "verifier_entropy",
    "kl",
    "reverse_kl",
    "js",
    "cross_entropy",
    "drafter_sum_squares",
    "verifier_sum_squares",
    "product_sum",
    "drafter_logsumexp",
    "verifier_logsumexp",
    "drafter_margin",
    "verifier_margin",
    "tv_unscaled",
    "tv",
)
MARGIN_COLUMNS = ("drafter_margin", "verifier_margin")  # since version 2
CASCADE_COLUMNS = ("draft_position", "origin")
TRUTH_COLUMNS = (
    "truth_drafter_argmax",
    "truth_verifier_argmax",
    "truth_drafter_log",
    "truth_verifier_log",
    "truth_drafter_prob",
    "truth_verifier_prob",
)
TAIL_COLUMNS = ("drafter_tail", "verifier_tail")
TOP_IDS = ("drafter_top_ids", "verifier_top_ids")
TOP_LOGPROBS = (
    "drafter_top_drafter_logprobs",
    "drafter_top_verifier_logprobs",
    "verifier_top_drafter_logprobs",
    "verifier_top_verifier_logprobs",
)
JUDGED_COLUMN = "judge_score"
JUDGED_HIDDEN = "verifier_hidden_at_token"
SEQUENCE_GAP = "sequence_gap"
SEQUENCE_ERROR = "sequence_error"
SEQUENCE_WORDS = "sequence_words"
SEQUENCE_TOKEN = "sequence_token"
SEQUENCE_GAPS = "sequence_gaps"
SEQUENCE_LOGPROBS = ("sequence_drafter_logprob", "sequence_verifier_logprob")  # of the token of a token label

_INTEGERS = frozenset({*INDEX_COLUMNS, "token", "drafter_argmax", "verifier_argmax"})
_SMALL = {"draft_position": pa.int16(), "origin": pa.int8()}


@dataclass(frozen=True)
class Layout:
    """Which optional columns a trace has.

    Attributes:
        top_k: K, logged candidates of each model; 0 logs none.
        hidden: width D by role ("drafter", "verifier") for the hidden states that are logged.
        truth: whether the truth group is there.
        cascade: whether prefixes come from a cascade, so that draft position and origin are known.
        judged: width D of the verifier's state at the judged token, where judge labels are logged; 0 for none.
        sequence: M, metrics of sequence labels; 0 for none.
        token_labels: whether these are of one drafted token (form ``token``).
        version: of the schema; before 2 there were no margins and no sequence labels.
    """

    top_k: int = 0
    hidden: Mapping[str, int] | None = None
    truth: bool = False
    cascade: bool = False
    judged: int = 0
    sequence: int = 0
    version: int = SCHEMA_VERSION
    token_labels: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: use 0 (log no candidates) or more")
        unknown = set(self.hidden or {}) - {"drafter", "verifier"}
        if unknown:
            raise InputError(f"hidden={sorted(unknown)}: use drafter, verifier or both")

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Column name to Arrow type, in file order."""
        names = [*INDEX_COLUMNS, *TOKEN_COLUMNS, *SUMMARY_COLUMNS]
        names = [name for name in names if self.version > 1 or name not in MARGIN_COLUMNS]
        names += CASCADE_COLUMNS if self.cascade else ()
        names += TRUTH_COLUMNS if self.truth else ()
        columns = {name: _scalar(name) for name in names}
        if self.top_k:
            columns |= {name: pa.float32() for name in TAIL_COLUMNS}
            columns |= {name: pa.list_(pa.int32(), self.top_k) for name in TOP_IDS}
            columns |= {name: pa.list_(pa.float16(), self.top_k) for name in TOP_LOGPROBS}
        for role, width in sorted((self.hidden or {}).items()):
            columns[f"{role}_hidden"] = pa.list_(pa.float16(), width)
        if self.judged:
            columns[JUDGED_COLUMN] = pa.float32()
            columns[JUDGED_HIDDEN] = pa.list_(pa.float16(), self.judged)
        if self.sequence:
            columns |= {name: pa.float32() for name in (SEQUENCE_GAP, SEQUENCE_ERROR, SEQUENCE_WORDS)}
            columns |= {SEQUENCE_TOKEN: pa.int32(), SEQUENCE_GAPS: pa.list_(pa.float32(), self.sequence)}
        if self.token_labels:
            columns |= {name: pa.float32() for name in SEQUENCE_LOGPROBS}
        return columns

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema; no column has nulls."""
        metadata = {"deferral_train.schema_version": str(self.version)}
        fields = [pa.field(name, kind, nullable=False) for name, kind in self.columns.items()]
        return pa.schema(fields, metadata=metadata)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's values, without Arrow's own few bytes per shard."""
        return sum(width(kind) * numpy_type(kind).itemsize for kind in self.columns.values())

    @property
    def shard_bytes(self) -> int:
        """Most bytes that a shard takes beyond its values: Arrow's messages and the padding of each buffer."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.arrow) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist([], schema=self.arrow))
        return int(sink.getvalue().size) + 64 * len(self.columns)

    def batch(self, columns: Mapping[str, np.ndarray]) -> pa.RecordBatch:
        """One record batch of NumPy columns ([N] or [N, K]), converted to the stored types.

        Raises:
            InputError: a column is missing, unknown, or of another length or width.
        """
        wanted = self.columns
        if set(columns) != set(wanted):
            missing, extra = sorted(set(wanted) - set(columns)), sorted(set(columns) - set(wanted))
            raise InputError(f"trace columns do not fit the layout: missing {missing}, unknown {extra}")
        rows = len(columns["prompt"])
        arrays = [_array(name, columns[name], kind, rows) for name, kind in wanted.items()]
        return pa.RecordBatch.from_arrays(arrays, schema=self.arrow)


def _scalar(name: str) -> pa.DataType:
    return _SMALL.get(name) or (pa.int32() if name in _INTEGERS else pa.float32())


def width(kind: pa.DataType) -> int:
    """Values per row of a column: the list size, 1 for a plain column."""
    return kind.list_size if pa.types.is_fixed_size_list(kind) else 1


def numpy_type(kind: pa.DataType) -> np.dtype:
    """NumPy type of a column's values."""
    value = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
    return np.dtype(value.to_pandas_dtype())


def _array(name: str, values: np.ndarray, kind: pa.DataType, rows: int) -> pa.Array:
    flat = np.ascontiguousarray(values, dtype=numpy_type(kind)).reshape(-1)
    if len(flat) != rows * width(kind):
        raise InputError(f"trace column {name}: {len(flat)} values for {rows} rows of {width(kind)}")
    plain = pa.array(flat)
    return (
        pa.FixedSizeListArray.from_arrays(plain, kind.list_size)
        if pa.types.is_fixed_size_list(kind)
        else plain
    )


def flat_values(array: pa.Array) -> np.ndarray:
    """A column's values without a copy, lists laid end to end; [N * K]."""
    if array.null_count:
        raise ValueError("a column has nulls")
    values = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
    return values.to_numpy(zero_copy_only=True)
