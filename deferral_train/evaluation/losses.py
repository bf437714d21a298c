"""Expected losses of both models at logged positions, under a chosen truth.

`traces.truth.gap` gives the difference that decisions need; here the drafter's own loss is added, so that
risks are absolute, and the loss of the emitted token, which compares rules of all families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deferral_train.errors import InputError
from deferral_train.rules.risks import LOSSES, floor_logprobs, gold_floor_hits
from deferral_train.traces import Traces
from deferral_train.traces import truth as truths

# E_P l(y, q), as a column of the truth group and as one minus a probability, by loss.
_TRUTH_COLUMN = {"zero_one": "truth_drafter_argmax", "log": "truth_drafter_log", "prob": "truth_drafter_prob"}
_VERIFIER_COLUMN = {"zero_one": "verifier_at_drafter_argmax", "log": "cross_entropy", "prob": "product_sum"}


@dataclass(frozen=True)
class Losses:
    """Expected losses under the truth, float32 [N] each: of the drafter and the gap drafter minus verifier.

    ``loss`` columns score both models by the chosen loss; ``emitted`` ones the token that is emitted, None
    where the traces cannot tell. ``floor_hits`` counts log losses that were capped.
    """

    drafter: np.ndarray
    gap: np.ndarray
    emitted_drafter: np.ndarray | None
    emitted_gap: np.ndarray | None
    floor_hits: int = 0

    def select(self, rows: slice | np.ndarray) -> Losses:
        """The losses of some rows."""
        emitted = self.emitted_drafter, self.emitted_gap
        drafter, gap = (None if column is None else column[rows] for column in emitted)
        return Losses(self.drafter[rows], self.gap[rows], drafter, gap, self.floor_hits)

    @staticmethod
    def joined(parts: Sequence[Losses]) -> Losses:
        """Losses of several tables, rows in order."""
        if len(parts) == 1:
            return parts[0]
        return Losses(
            np.concatenate([part.drafter for part in parts]),
            np.concatenate([part.gap for part in parts]),
            _joined([part.emitted_drafter for part in parts]),
            _joined([part.emitted_gap for part in parts]),
            sum(part.floor_hits for part in parts),
        )


def _joined(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [column for column in columns if column is not None]
    return np.concatenate(known) if len(known) == len(columns) else None


def make_losses(traces: Traces, loss: str, truth: str, temperature: float) -> Losses:
    """Losses [N] of every row.

    The emitted token's loss is 1[y != emitted] at temperature 0 and 1 - pi(y) at temperature 1; at other
    temperatures the distributions that are sampled from are not in the traces, and it is left out.

    Raises:
        InputError: an unknown loss, rows without a gold token under truth "reference", a truth that is not
            logged.
    """
    if loss not in LOSSES:
        raise InputError(f"loss is {loss!r}; use one of {', '.join(LOSSES)}")
    of_emitted = {0.0: "zero_one", 1.0: "prob"}.get(float(temperature))
    emitted_drafter = emitted_gap = None
    if of_emitted is not None:
        emitted_drafter, emitted_gap = _loss_and_gap(traces, of_emitted, truth)
    hits = 0
    if loss == "log" and truth == "reference":
        hits = gold_floor_hits(traces.summary(("drafter_logprob", "verifier_logprob")))
    drafter, gap = _loss_and_gap(traces, loss, truth)
    return Losses(drafter, gap, emitted_drafter, emitted_gap, hits)


def _loss_and_gap(traces: Traces, loss: str, truth: str) -> tuple[np.ndarray, np.ndarray]:
    gap = truths.gap(traces, truth, loss).to(torch.float32).numpy()
    return drafter_loss(traces, loss, truth).astype(np.float32), gap


def drafter_loss(traces: Traces, loss: str, truth: str) -> np.ndarray:
    """E_P l(y, q) at each row, [N]."""
    if truth == "reference":
        return _reference_loss(traces, loss)
    column = (_VERIFIER_COLUMN if truth == "verifier" else _TRUTH_COLUMN)[loss]
    values = traces.column(column)
    return values if loss == "log" else 1 - values


def _reference_loss(traces: Traces, loss: str) -> np.ndarray:
    gold = traces.column("gold")
    if loss == "zero_one":
        return gold != traces.column("drafter_argmax")
    if not np.array_equal(gold, traces.column("token")):
        raise InputError(
            f"loss={loss!r} with truth='reference' needs the gold token's probabilities, and on these "
            "prefixes the logged token is another one; use loss='zero_one', or truth='verifier'"
        )
    logprob = torch.from_numpy(np.array(traces.column("drafter_logprob")))
    return (-floor_logprobs(logprob).values if loss == "log" else 1 - logprob.exp()).numpy()
