"""GapHead: one regression of the loss gap serves every alpha."""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.heads import serving
from deferral_train.heads.base import DeferralHead
from deferral_train.rules.numbers import Numbers
from deferral_train.rules.summary import Summary


class GapHead(DeferralHead):
    """Regresses gap = E_P[l(y,q) - l(y,p)]; an error of e costs at most e in regret, for every alpha at once.

    At the draft stage it also predicts tv and the probability that the drafted token is rejected, both
    through a sigmoid. Body outputs: gap, or gap, tv, reject.
    """

    head_type = "gap"

    @property
    def outputs(self) -> int:
        return 1 if self.stage == "verify" else 3

    @property
    def reads_numbers(self) -> bool:
        """Whether :meth:`gap` takes :class:`~deferral_train.rules.numbers.Numbers`, and gives an array, too."""
        # A class of someone's own may compute anything: only this one is known to be its body alone.
        return type(self) is GapHead and self.stage == "verify" and serving.plain(self) is not None

    def gap(self, summary: Summary) -> Tensor:
        """Estimated gap ``[..]`` in units of the loss; not-a-number inputs give +inf, which defers."""
        if isinstance(summary, Numbers):
            return serving.gap_of_numbers(serving.known(self), summary)
        if summary.shape.numel() > serving.MOST_ROWS or not self.reads_numbers:
            return super().gap(summary)
        return serving.verify_stage_gap(serving.known(self), summary)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.body(self.prepare(x))
        if self.stage == "verify":
            return {"gap": self.gate(x, out[:, 0])}
        return {"gap": out[:, 0], "tv": torch.sigmoid(out[:, 1]), "reject": torch.sigmoid(out[:, 2])}
