"""Add verdicts of a step to the counters. R rows, T drafted positions."""

from __future__ import annotations

import numpy as np

from deferral_train.rules import Origin
from deferral_train.serving.blocks import Outcome
from deferral_train.serving.counters import BLOCK_COUNTERS, Counters


def tally(counters: Counters, lengths: np.ndarray, outcome: Outcome, prefix: str) -> None:
    """Add a step's blocks of ``lengths`` [R] drafted tokens to the counters named ``prefix + name``.

    drafted = kept + accepted + rejected + discarded holds on every row. A block whose every draft was withdrawn before
    it was verified is none.
    """
    accepted, origin = outcome.accepted.numpy(), outcome.origin.numpy()
    place = np.arange(outcome.deferred.shape[1])
    passed = place < accepted[:, None]
    reached = (place <= accepted[:, None]) & (place < lengths[:, None])
    drafted, stands = int(lengths.sum()), int(accepted.sum())
    kept, rejected = np.count_nonzero(origin == int(Origin.KEPT)), np.count_nonzero(accepted < lengths)
    amounts = {
        "blocks": np.count_nonzero(lengths),
        "drafted": drafted,
        "deferred": np.count_nonzero(outcome.deferred.numpy() & reached),
        "kept": kept,
        "accepted": stands - kept,
        "rejected": rejected,
        "discarded": drafted - stands - rejected,
        "squares": int((accepted**2).sum()),
        "estimated_loss": float(outcome.loss.sum()),
    }
    counters.add_block(prefix, np.array([amounts[name] for name in BLOCK_COUNTERS], dtype=float))
    counters.add_places(prefix + "reached", reached.sum(axis=0))
    counters.add_places(prefix + "passed", passed.sum(axis=0))
