"""Outcomes into counters. R rows, T drafted positions."""

from __future__ import annotations

import numpy as np

from deferral_train.rules import Origin
from deferral_train.serving.blocks import Outcome, Rows
from deferral_train.serving.counters import Counters


def tally(counters: Counters, rows: Rows, outcome: Outcome, prefix: str) -> None:
    """Add a step's blocks to the counters named ``prefix + name``.

    drafted = kept + accepted + rejected + discarded holds on every row.
    """
    accepted, lengths = outcome.accepted.cpu().numpy(), rows.lengths.cpu().numpy()
    origin, deferred = outcome.origin.cpu().numpy(), outcome.deferred.cpu().numpy()
    place = np.arange(deferred.shape[1])
    reached = (place <= accepted[:, None]) & (place < lengths[:, None])
    passed = place < accepted[:, None]
    rejected = int((accepted < lengths).sum())
    kept = int((origin == int(Origin.KEPT)).sum())
    stands = int(accepted.sum())
    amounts = {
        "blocks": len(accepted),
        "drafted": int(lengths.sum()),
        "deferred": int((deferred & reached).sum()),
        "kept": kept,
        "accepted": stands - kept,
        "rejected": rejected,
        "discarded": int(lengths.sum()) - stands - rejected,
        "squares": float((accepted.astype(np.float64) ** 2).sum()),
        "estimated_loss": float(outcome.loss.sum()),
    }
    for name, amount in amounts.items():
        counters.add(prefix + name, amount)
    counters.add_places(prefix + "reached", reached.sum(axis=0))
    counters.add_places(prefix + "passed", passed.sum(axis=0))
