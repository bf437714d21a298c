"""PlugInHead: the paper's plug-in gap max p - max q, with each confidence recalibrated on gold tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead


class PlugInHead(DeferralHead):
    """Gap = c_p(max p) - c_q(max q); recalibration ``"none"`` is OPT itself (eq. 10), others recalibrated
    OPT.

    A baseline without trained weights, scored, stored and served through the same interface as learned heads.
    """

    head_type = "plug_in"

    def __init__(self, features: Sequence[str] = ("drafter_max", "verifier_max"), **arguments: Any) -> None:
        super().__init__(features, **{**arguments, "body": "linear"})
        self.gated = False
        if {str(f) for f in self.inputs.features} != {
            "drafter_max",
            "verifier_max",
        } or self.loss != "zero_one":
            raise InputError(
                "a plug_in head reads drafter_max and verifier_max under loss='zero_one', nothing else"
            )

    @property
    def outputs(self) -> int:
        return 1

    def extra_columns(self) -> tuple[str, ...]:
        return ()

    def make_body(self, kind: str, hidden: Sequence[int]) -> nn.Module:
        return nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.recalibrated(x)
        return {"gap": self.inputs.column(x, "verifier_max") - self.inputs.column(x, "drafter_max")}
