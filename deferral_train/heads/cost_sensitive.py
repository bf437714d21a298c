"""CostSensitiveHead: classify 1[z > alpha * tv] with weight |z - alpha * tv|, alpha being an input."""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead, decisions
from deferral_train.rules.summary import Summary

BISECTIONS = 20


class CostSensitiveHead(DeferralHead):
    """A decision score for (features, alpha): defer where it is positive.

    Weighted logistic loss with alpha drawn afresh is Fisher-consistent for the sign of E[z] - alpha * tv, z
    being an unbiased label of the gap. Rules call :meth:`defer`. At the verify
    stage the body sees alpha and alpha * tv besides the features, at the draft stage alpha alone.
    """

    head_type = "cost_sensitive"
    objectives = ("cost_sensitive",)
    takes_alpha = True
    inputs_beside = 2

    @property
    def outputs(self) -> int:
        return 1

    def extra_columns(self) -> tuple[str, ...]:
        return (*super().extra_columns(), *(("tv",) if self.stage == "verify" else ()))

    def score(self, x: Tensor, alpha: Tensor) -> Tensor:
        """Score ``[N]`` of raw columns ``[N, C]`` at ``alpha [N]``."""
        price = alpha * self.inputs.column(x, "tv") if self.stage == "verify" else alpha
        beside = torch.stack([alpha, price], dim=-1).to(x.dtype)
        score = self.body(torch.cat([self.prepare(x), beside], dim=-1))[:, 0]
        if not self.gated:
            return score
        # Where the argmaxes agree the gap is 0 and only the sign of the price matters; ties keep the drafter.
        return torch.where(self.inputs.column(x, "argmaxes_differ") > 0, score, -price)

    def forward(self, x: Tensor, alpha: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"score": self.score(x, alpha)}

    def defer(self, summary: Summary, alpha: float) -> Tensor:
        """Decision ``[..]`` at a scalar alpha; not-a-number scores defer."""
        x = self.columns(summary)
        flat = x.reshape(-1, x.shape[-1])
        with decisions(x):
            score = self.score(flat, torch.full_like(flat[:, 0], alpha))
        return ~(score <= 0).reshape(x.shape[:-1])

    def gap(self, summary: Summary) -> Tensor:
        """Implied gap ``[..]``: tv times the alpha at which the decision flips, found by bisection on [-1,
        2].

        For limits and reliability diagrams; decisions use :meth:`defer`. Verify stage only.
        """
        if self.stage == "draft":
            raise InputError("a draft-stage cost_sensitive head implies no gap; use a gap head")
        x = self.columns(summary)
        flat = x.reshape(-1, x.shape[-1])
        low, high = torch.full_like(flat[:, 0], -1.0), torch.full_like(flat[:, 0], 2.0)
        with decisions(x):
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                defers = ~(self.score(flat, middle) <= 0)
                low, high = torch.where(defers, middle, low), torch.where(defers, high, middle)
        return (high * self.inputs.column(flat, "tv")).reshape(x.shape[:-1])
