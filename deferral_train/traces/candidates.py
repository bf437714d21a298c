"""The logged candidates of trace rows, as token and distribution rules read them."""

from __future__ import annotations

import numpy as np
import torch

from deferral_train.errors import InputError
from deferral_train.rules.tails import Candidates
from deferral_train.traces.reader import Traces
from deferral_train.traces.schema import TOP_IDS, TOP_LOGPROBS


def read_candidates(traces: Traces, rows: slice | np.ndarray | None = None) -> Candidates:
    """Candidates of some rows (default all; for long traces, take slices), log probabilities in float32.

    K of each model are logged, so that a position has up to 2K distinct tokens.

    Raises:
        InputError: the traces were collected with ``--log-top-k 0``.
    """
    if not traces.manifest.top_k:
        raise InputError(
            "these traces log no candidates (--log-top-k 0); token rules need them: collect again"
        )
    where = slice(None) if rows is None else rows
    ids = [torch.from_numpy(traces.column(name)[where].copy()).long() for name in TOP_IDS]
    logs = [torch.from_numpy(traces.column(name)[where].copy()).float() for name in TOP_LOGPROBS]
    return Candidates.union(ids[0], (logs[0], logs[1]), ids[1], (logs[2], logs[3]))
