"""Heads that estimate the truth: P^(v) for any token v from (log p(v), log q(v)) and features of the
position.

N positions, K candidate tokens. P^ gives the gap P^(v_p) - P^(v_q), and serves token rules as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.rules.summary import Summary

FLOOR = 1e-10
LOG_FLOOR = -23.025850929940457  # log of FLOOR
CROSS = (
    "drafter_max",
    "verifier_max",
    "drafter_at_verifier_argmax",
    "verifier_at_drafter_argmax",
    "argmaxes_differ",
)


class TruthHead(DeferralHead):
    """Common part: three numbers (a, b, c) per position, read by :meth:`log_truth` of a subclass.

    ``forward`` gives the gap and, as ``truth``, what the verifier's emission is worth. With the body's last
    layer at zero, (a, b, c) = (1, 0, 0): training starts from P^ = p.
    """

    losses: ClassVar[tuple[str, ...]] = ("zero_one",)

    def __init__(self, features: Sequence[str], **arguments: Any) -> None:
        super().__init__(features, **arguments)
        if self.stage != "verify" or self.loss not in self.losses:
            raise InputError(
                f"a {self.head_type} head needs stage='verify' and loss {' or '.join(self.losses)}, "
                f"got {self.stage!r} and {self.loss!r}"
            )

    @property
    def outputs(self) -> int:
        return 3

    def extra_columns(self) -> tuple[str, ...]:
        return CROSS

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c), each ``[N]``: weight of log p, weight of log q, bias."""
        a, b, c = self.body(self.prepare(x))[:, :3].unbind(-1)
        return 1 + a, b, c

    def log_truth(self, x: Tensor, drafter: Tensor, verifier: Tensor) -> Tensor:
        """log P^ ``[N, K]`` of candidates with log q ``drafter [N, K]`` and log p ``verifier [N, K]``."""
        raise NotImplementedError

    def argmax_logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log q and log p, each ``[N, 2]``, at v_p (column 0) and v_q (column 1)."""
        at = {name: self.inputs.column(x, name).clamp_min(FLOOR).log() for name in CROSS[:4]}
        drafter = torch.stack([at["drafter_at_verifier_argmax"], at["drafter_max"]], dim=-1)
        verifier = torch.stack([at["verifier_max"], at["verifier_at_drafter_argmax"]], dim=-1)
        return drafter, verifier

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        truth = self.log_truth(x, *self.argmax_logs(x)).exp()
        return {"gap": self.gate(x, truth[:, 0] - truth[:, 1]), "truth": truth[:, 0]}

    def truth(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """P^ ``[.., K]`` for candidates given by log q and log p ``[.., K]`` at the positions of
        ``summary``.
        """
        x = self.columns(summary)
        shape = drafter_logprobs.shape
        with torch.no_grad():
            logs = [
                t.reshape(-1, shape[-1]).float().clamp_min(LOG_FLOOR)
                for t in (drafter_logprobs, verifier_logprobs)
            ]
            return self.log_truth(x.reshape(-1, x.shape[-1]), *logs).exp().reshape(shape)

    def verifier_value(self, summary: Summary) -> Tensor:
        """What leaving the emission to the verifier is worth, ``[..]``: P^(v_p), or E_P p(y) for loss prob."""
        return self._predict(summary, "truth")


class TruthMixtureHead(TruthHead):
    """P^(v) proportional to p(v)^a q(v)^b, with a, b and the weight of the remaining tokens learned per
    position.

    The normaliser is that of three classes v_p, v_q and all others, whose weight is p_rest^a q_rest^b e^c;
    so P^ needs the summary alone, online as well as offline. It is trained by the negative log-likelihood
    of gold tokens: of their class, and, among the others, of the logged candidates and the tail. Regret is
    at most 2 max_v |P(v) - P^(v)|.
    """

    head_type = "truth_mixture"

    def class_logits(self, x: Tensor) -> Tensor:
        """Unnormalised log weights ``[N, 3]`` of v_p, v_q (-inf where equal to v_p) and the rest."""
        a, b, c = self.coefficients(x)
        drafter, verifier = self.argmax_logs(x)
        differ = self.inputs.column(x, "argmaxes_differ")
        rest_p = self._rest(verifier.exp(), differ)
        rest_q = self._rest(drafter.exp(), differ)
        top = a.unsqueeze(-1) * verifier + b.unsqueeze(-1) * drafter
        second = torch.where(differ > 0, top[:, 1], torch.full_like(a, -torch.inf))
        return torch.stack([top[:, 0], second, a * rest_p + b * rest_q + c], dim=-1)

    @staticmethod
    def _rest(probabilities: Tensor, differ: Tensor) -> Tensor:
        """log of the mass outside {v_p, v_q}, floored where rounding leaves nothing."""
        return (1 - probabilities[:, 0] - differ * probabilities[:, 1]).clamp_min(1e-6).log()

    def log_truth(self, x: Tensor, drafter: Tensor, verifier: Tensor) -> Tensor:
        a, b, _ = self.coefficients(x)
        normaliser = self.class_logits(x).logsumexp(-1, keepdim=True)
        weight = a.unsqueeze(-1) * verifier + b.unsqueeze(-1) * drafter
        return (weight - normaliser).clamp_max(0)


class TokenHead(TruthHead):
    """Token-wise head: P^(v) = sigmoid(a log p(v) + b log q(v) + c), trained to tell gold from candidates.

    The body runs once per position; over the vocabulary it costs one multiply-add per token. Its token rule
    keeps v where P^(v) is near enough to what the verifier's emission is worth: P^(v_p) under zero_one (eq.
    12), and E_P p(y) under prob, the loss of sampled tokens. For prob the body also estimates E_P p(y) and
    E_P q(y), starting from their values under P := p, and the gap is their difference.
    """

    head_type = "token"
    losses = ("zero_one", "prob")

    @property
    def outputs(self) -> int:
        return 3 if self.loss == "zero_one" else 5

    def extra_columns(self) -> tuple[str, ...]:
        return CROSS if self.loss == "zero_one" else (*CROSS, "verifier_sum_squares", "product_sum")

    def log_odds(self, x: Tensor, drafter: Tensor, verifier: Tensor) -> Tensor:
        """Log-odds of each candidate being the gold token, ``[N, K]``."""
        a, b, c = (t.unsqueeze(-1) for t in self.coefficients(x))
        return a * verifier + b * drafter + c

    def log_truth(self, x: Tensor, drafter: Tensor, verifier: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(self.log_odds(x, drafter, verifier))

    def value_odds(self, x: Tensor) -> Tensor:
        """Log-odds ``[N, 2]`` of E_P p(y) and E_P q(y); loss prob only."""
        raw = self.body(self.prepare(x))[:, 3:]
        prior = [self.inputs.column(x, name) for name in ("verifier_sum_squares", "product_sum")]
        return raw + torch.logit(torch.stack(prior, dim=-1), eps=1e-6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.loss == "zero_one":
            return super().forward(x)
        values = torch.sigmoid(self.value_odds(x))
        return {"gap": values[:, 0] - values[:, 1], "truth": values[:, 0]}
