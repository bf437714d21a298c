"""Score a head on a table outside of a training run: the same tracker, the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deferral_train.heads.base import SEQUENCE_LOSSES, DeferralHead
from deferral_train.training.loader import TableLoader
from deferral_train.training.tracking import Tracker, predict

ROWS = 65_536


def label_range(loss: str, z: Tensor) -> tuple[float, float]:
    """Where gap labels lie: [-1, 1], but for the log loss and finished texts the labels' own range."""
    if loss == "log" or loss in SEQUENCE_LOSSES:
        return float(z.min()), float(z.max()) + 1e-6
    return -1.0, 1.0


def score(head: DeferralHead, table: Mapping[str, Tensor], alphas: Sequence[float]) -> dict[str, float]:
    """Scalars of :class:`Tracker` for a head on a score table."""
    tracker = Tracker(head, alphas, "exact" in table, label_range(head.loss, table["z"]))
    grid = torch.tensor(list(alphas))
    with torch.no_grad():
        for batch in TableLoader(table, ROWS):
            tracker.update(predict(head, batch, grid), batch)
    return tracker.compute()
