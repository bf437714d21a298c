"""GapHead: one regression of the loss gap serves every alpha."""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.heads.base import DeferralHead


class GapHead(DeferralHead):
    """Regresses gap = E_P[l(y,q) - l(y,p)]; an error of e costs at most e in regret, for every alpha at once.

    At the draft stage it also predicts tv and the probability that the drafted token is rejected, both
    through a sigmoid. Body outputs: gap, or gap, tv, reject.
    """

    head_type = "gap"

    @property
    def outputs(self) -> int:
        return 1 if self.stage == "verify" else 3

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.body(self.prepare(x))
        if self.stage == "verify":
            return {"gap": self.gate(x, out[:, 0])}
        return {"gap": out[:, 0], "tv": torch.sigmoid(out[:, 1]), "reject": torch.sigmoid(out[:, 2])}
