"""scikit-learn baselines behind the interface of a head: ridge, multinomial logistic, gradient boosting.

They are fitted in one call on the same columns and scored by the same tracker. They are not exported: a
served head is torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.training.preparation import blocks

MAX_ROWS = 500_000  # rows at most that an estimator is fitted on
KINDS = ("ridge", "logistic", "boosting")


class SklearnHead(DeferralHead):
    """Gap estimated by a scikit-learn model on normalised features.

    ``ridge`` and ``boosting`` regress z; ``logistic`` classifies z in {-1, 0, 1} and returns P(1) - P(-1),
    so it needs the zero_one loss. Verify stage only.
    """

    head_type = "sklearn"

    def __init__(self, kind: str, features: Sequence[str], *, seed: int = 0, **arguments: Any) -> None:
        super().__init__(features, **{**arguments, "body": "linear"})
        if kind not in KINDS or self.stage != "verify":
            raise InputError(
                f"baseline {kind!r} at stage {self.stage!r}: use one of {', '.join(KINDS)} at verify"
            )
        if kind == "logistic" and self.loss != "zero_one":
            raise InputError(f"a logistic baseline needs loss='zero_one', got {self.loss!r}")
        self.kind, self.estimator = kind, make_estimator(kind, seed)

    @property
    def outputs(self) -> int:
        return 1

    def make_body(self, kind: str, hidden: Sequence[int]) -> nn.Module:
        return nn.Identity()

    def fit_table(self, table: dict[str, Tensor]) -> None:
        """Normalise and fit on a fit table; where the gap is gated, on the rows where it is not known."""
        self.fit_normalisation(blocks(table["x"]))
        x, z = table["x"], table["z"]
        if self.gated:
            told = self.inputs.column(x, "argmaxes_differ") > 0
            x, z = x[told], z[told]
        x, z = x[:MAX_ROWS], z[:MAX_ROWS]
        self.estimator.fit(
            self.prepare(x).numpy(), z.long().numpy() if self.kind == "logistic" else z.numpy()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        prepared = self.prepare(x).detach().numpy()
        if self.kind == "logistic":
            shares = dict(zip(self.estimator.classes_, self.estimator.predict_proba(prepared).T))
            nothing = np.zeros(len(prepared))
            gap = shares.get(1, nothing) - shares.get(-1, nothing)
        else:
            gap = self.estimator.predict(prepared)
        return {"gap": self.gate(x, torch.from_numpy(np.asarray(gap, dtype=np.float32)))}

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        raise InputError(
            f"a scikit-learn {self.kind} baseline cannot be exported; exported heads are torch only"
        )


def make_estimator(kind: str, seed: int) -> Any:
    """The scikit-learn model of a kind."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression, Ridge

    if kind == "ridge":
        return Ridge(alpha=1.0)
    if kind == "logistic":
        return LogisticRegression(max_iter=500)
    return HistGradientBoostingRegressor(
        max_iter=150, learning_rate=0.05, max_leaf_nodes=15, random_state=seed
    )
