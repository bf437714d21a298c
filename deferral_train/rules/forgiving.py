"""Rules that judge a drafted block as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import BlockRule, Dial, register
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.summary import Summary

TOP = 3  # tokens in the entropy of the gate, as in the authors' code; it is at most log 3 = 1.0986


@register
@dataclass(frozen=True)
class FLy(BlockRule):
    """FLy (arXiv 2511.22972): a token that failed the exact check stands iff the verifier is unsure there and the next
    ``window`` drafted tokens all pass.

    Unsure: -sum p log p over the verifier's three likeliest tokens is at least ``threshold`` nats. The window must lie
    within the draft. Published with threshold 0.3, a window of 6 and drafts of 15 to 25 tokens, at temperature 0, where
    a token passes that is the verifier's argmax. When sampling, a token passes with probability min(1, p/q), and x_i
    stands with probability a_i + (1 - a_i) gate_i a_{i+1} ... a_{i+window}, a the probabilities to pass (the authors'
    code draws two tokens of the verifier and lets either pass). At threshold 1.1 nothing is forgiven.
    """

    name: ClassVar[str] = "fly"
    dial: ClassVar[Dial] = Dial("threshold", 0.0, 1.1, lossless=1.1, drafter=None)

    threshold: float = 0.3
    window: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise InputError(f"rule fly: window is {self.window!r}; give an integer of at least 1")

    @property
    def reach(self) -> int:
        """The window."""
        return self.window

    def forgives(self, passes: Tensor, distributions: Distributions, summary: Summary) -> Tensor:
        """The window behind passes, and the entropy reaches the threshold, bool [.., T]."""
        behind = torch.nn.functional.pad(passes.view(torch.int8), (0, self.window)).unfold(-1, self.window, 1)
        top = distributions.verifier(distributions.probs)
        top = top.topk(min(TOP, top.shape[-1])).values
        surprise = torch.xlogy(top, top).sum(dim=-1)
        return behind[..., 1:, :].all(dim=-1) & (surprise <= -self.threshold)
