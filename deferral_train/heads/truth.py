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
from deferral_train.heads.base import DeferralHead, decisions
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
# q(v_p), q(v_q), p(v_p), p(v_q)
AT_ARGMAXES = ("drafter_at_verifier_argmax", "drafter_max", "verifier_max", "verifier_at_drafter_argmax")


class TruthHead(DeferralHead):
    """Base of heads that estimate P^(v) from three numbers (a, b, c) per position; subclasses give :meth:`log_truth`.

    ``forward`` gives the gap and, as ``truth``, :meth:`verifier_value`. With the body's last
    layer at zero, (a, b, c) = (1, 0, 0): training starts from P^ = p.
    """

    needs_candidates = True
    losses: ClassVar[tuple[str, ...]] = ("zero_one",)
    at_argmaxes: Tensor

    def __init__(self, features: Sequence[str], **arguments: Any) -> None:
        super().__init__(features, **arguments)
        if self.stage != "verify" or self.loss not in self.losses:
            raise InputError(
                f"a {self.head_type} head needs stage='verify' and loss {' or '.join(self.losses)}, "
                f"got {self.stage!r} and {self.loss!r}"
            )
        places = torch.tensor([self.inputs.start[name] for name in AT_ARGMAXES])
        self.register_buffer("at_argmaxes", places, persistent=False)

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
        logs = self.argmax_probs(x).clamp_min(FLOOR).log()
        return logs[:, 0], logs[:, 1]

    def argmax_probs(self, x: Tensor) -> Tensor:
        """q and p at v_p and v_q, ``[N, 2, 2]``: drafter before verifier, v_p before v_q."""
        return x.index_select(-1, self.at_argmaxes).reshape(-1, 2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        truth = self.log_truth(x, *self.argmax_logs(x)).exp()
        return {"gap": self.gate(x, truth[:, 0] - truth[:, 1]), "truth": truth[:, 0]}

    def truth(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """P^ ``[.., K]`` for candidates given by log q and log p ``[.., K]`` at the positions of
        ``summary``.
        """
        x = self.columns(summary)
        shape = drafter_logprobs.shape
        with decisions(x):
            logs = [
                t.reshape(-1, shape[-1]).float().clamp_min(LOG_FLOOR)
                for t in (drafter_logprobs, verifier_logprobs)
            ]
            return self.log_truth(x.reshape(-1, x.shape[-1]), *logs).exp().reshape(shape)

    def verifier_value(self, summary: Summary) -> Tensor:
        """Estimated chance ``[..]`` that the verifier's token is right: P^(v_p), or E_P p(y) for loss prob."""
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
    objectives = ("likelihood", "squared", "huber", "cost_sensitive")
    masks: Tensor

    def __init__(self, features: Sequence[str], **arguments: Any) -> None:
        super().__init__(features, **arguments)
        # Added to the logits of v_p, v_q and the rest: nothing, or what takes v_q out where it is v_p.
        self.register_buffer(
            "masks", torch.tensor([[0.0, 0.0, 0.0], [0.0, -torch.inf, 0.0]]), persistent=False
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        distribution = self.class_logits(x).softmax(-1)
        return {"gap": self.gate(x, distribution[:, 0] - distribution[:, 1]), "truth": distribution[:, 0]}

    def class_logits(self, x: Tensor) -> Tensor:
        """Unnormalised log weights ``[N, 3]`` of v_p, v_q (-inf where equal to v_p) and the rest."""
        return self._logits_and_weights(x)[0]

    def _logits_and_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`class_logits`, and the weights (b, a) ``[N, 2]`` of log q and log p.

        Few operations on whole rows: at batch 1 the time goes into their number.
        """
        raw = self.body(self.prepare(x))
        weights = raw[:, :2].flip(-1) + self.masks.new_tensor([0.0, 1.0])
        differ = self.inputs.column(x, "argmaxes_differ").unsqueeze(-1)
        at = self.argmax_probs(x)
        # The mass outside {v_p, v_q}, floored where rounding leaves nothing.
        rest = 1 - at[..., 0] - differ * at[..., 1]
        logs = torch.cat([at.clamp_min(FLOOR), rest.clamp_min(1e-6).unsqueeze(-1)], dim=-1).log()
        logits = (weights.unsqueeze(1) @ logs).squeeze(1)
        logits = logits + raw[:, 2:] * self.masks.new_tensor([0.0, 0.0, 1.0])
        return logits + torch.where(differ > 0, self.masks[0], self.masks[1]), weights

    def log_truth(self, x: Tensor, drafter: Tensor, verifier: Tensor) -> Tensor:
        logits, weights = self._logits_and_weights(x)
        weight = weights[:, 1:] * verifier + weights[:, :1] * drafter
        return (weight - logits.logsumexp(-1, keepdim=True)).clamp_max(0)


class TokenHead(TruthHead):
    """Token-wise head: P^(v) = sigmoid(a log p(v) + b log q(v) + c), trained to tell gold from candidates.

    The body runs once per position; over the vocabulary it costs one multiply-add per token. Its token rule
    keeps v where P^(v) is near enough to what the verifier's emission is worth: P^(v_p) under zero_one (eq.
    12), and E_P p(y) under prob, the loss of sampled tokens. For prob the body also estimates E_P p(y) and
    E_P q(y), starting from their values under P := p, and the gap is their difference.
    """

    head_type = "token"
    objectives = ("candidates", "squared", "huber")
    tokenwise = True
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
