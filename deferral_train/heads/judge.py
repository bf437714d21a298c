"""JudgeHead: the probability that a drafted token is acceptable, for the accept-or-exact rule and for stopping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.rules.summary import Summary


class JudgeHead(DeferralHead):
    """Logistic head: score = sigmoid(body(features)), linear by default.

    At the verify stage the score is the probability that the drafted token may stand although the verifier
    prefers another (SelfJudge, arXiv 2510.02329; AutoJudge, 2504.20039), for the rule ``judge``. At the draft
    stage it is the probability that the verifier's exact check accepts the token (SpecDec++, 2405.19715), for
    ``AcceptanceStop``. As a loss gap it is 1 - score, the expected loss 1[not acceptable] of keeping.
    """

    head_type = "judge"
    objectives = ("judge",)
    dial = "threshold"

    def __init__(self, features: Sequence[str], *, body: str = "linear", **arguments: Any) -> None:
        super().__init__(features, body=body, **arguments)
        if self.loss != "zero_one":
            raise InputError(f"a judge head needs loss='zero_one', got {self.loss!r}")

    @property
    def outputs(self) -> int:
        return 1

    def odds(self, x: Tensor) -> Tensor:
        """Log-odds ``[N]`` of being acceptable, from raw columns ``[N, C]``."""
        return self.body(self.prepare(x))[:, 0]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        score = torch.sigmoid(self.odds(x))
        if self.stage == "verify":
            return {"gap": self.gate(x, 1 - score), "score": score}
        return {"gap": 1 - score, "tv": 1 - score, "reject": 1 - score, "score": score}

    def score(self, summary: Summary) -> Tensor:
        """Probability ``[..]`` that the summary's token is acceptable; not-a-number inputs give 0."""
        return self._predict(summary, "score").nan_to_num(nan=0.0)
