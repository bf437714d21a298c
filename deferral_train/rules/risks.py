"""Risks of deferral: token losses, the loss gap, the optimal rule, exact regret, and what bounds it.

Notation: q drafter, p verifier, P the true next-token distribution, r = 1 defers. gap = E_P[l(y,q) - l(y,p)], tv =
    D_TV(p,q).
Sources: Narasimhan et al. 2025, equations (3) to (9) and Lemmas 1, 4, 5; docs/equations.md maps them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.distributions import gather_token
from deferral_train.rules.summary import Summary

LOSSES = ("zero_one", "log", "prob")
LOG_FLOOR = -20.0  # nats; log losses are capped at -LOG_FLOOR, and hits are counted


class Floored(NamedTuple):
    """Log probabilities after the floor, and which entries it changed."""

    values: Tensor
    hits: Tensor


def floor_logprobs(logprobs: Tensor, floor: float = LOG_FLOOR) -> Floored:
    """max(log prob, floor), and where the floor was hit (report the count: the estimate is biased there)."""
    return Floored(logprobs.clamp(min=floor), logprobs < floor)


def token_loss(loss: str, distribution: Tensor, y: Tensor, floor: float = LOG_FLOOR) -> Tensor:
    """l(y, distribution) for the observed token: zero_one 1[y != argmax], log -log prob (floored), prob 1 - prob.

    Args:
        distribution: probabilities [.., V].
        y: ids [..].
    """
    _check_loss(loss)
    if loss == "zero_one":
        return (y != distribution.max(dim=-1).indices).to(distribution.dtype)
    at_y = gather_token(distribution, y)
    return 1 - at_y if loss == "prob" else -floor_logprobs(at_y.log(), floor).values


def expected_loss(loss: str, distribution: Tensor, truth: Tensor, floor: float = LOG_FLOOR) -> Tensor:
    """E_P l(y, distribution), from distributions [.., V]."""
    _check_loss(loss)
    if loss == "zero_one":
        return 1 - gather_token(truth, distribution.max(dim=-1).indices)
    if loss == "prob":
        return 1 - (truth * distribution).sum(dim=-1)
    return -(truth * floor_logprobs(distribution.log(), floor).values).sum(dim=-1)


def gap_from_truth(q: Tensor, p: Tensor, truth: Tensor, loss: str = "zero_one") -> Tensor:
    """E_P[l(y,q) - l(y,p)] for a known P, from distributions [.., V]."""
    return expected_loss(loss, q, truth) - expected_loss(loss, p, truth)


def expected_gap(summary: Summary, loss: str = "zero_one") -> Tensor:
    """The loss gap under P := p, from the summary: zero_one p(v_p) - p(v_q); log KL(p||q); prob sum p (p -
    q).

    It trusts the verifier. Being a function of what a verify-stage head sees, it measures no head.
    """
    _check_loss(loss)
    if loss == "zero_one":
        return summary["verifier_max"] - summary["verifier_at_drafter_argmax"]
    if loss == "log":
        return summary["kl"]
    return summary["verifier_sum_squares"] - summary["product_sum"]


def gap_from_gold(summary: Summary, loss: str = "zero_one", floor: float = LOG_FLOOR) -> Tensor:
    """l(y,q) - l(y,p) for one gold token y = summary.token: unbiased for the gap, and noisy.

    zero_one 1[y != v_q] - 1[y != v_p]; log -log q(y) + log p(y), each floored (count hits with
    `gold_floor_hits`); prob p(y) - q(y).
    """
    _check_loss(loss)
    if loss == "zero_one":
        y = summary["token"]
        dtype = summary["drafter_max"].dtype if "drafter_max" in summary else torch.get_default_dtype()
        wrong = (y != summary["drafter_argmax"]).to(dtype)
        return wrong - (y != summary["verifier_argmax"]).to(dtype)
    drafter, verifier = summary["drafter_logprob"], summary["verifier_logprob"]
    if loss == "prob":
        return verifier.exp() - drafter.exp()
    return floor_logprobs(verifier, floor).values - floor_logprobs(drafter, floor).values


def gold_floor_hits(summary: Summary, floor: float = LOG_FLOOR) -> int:
    """How many gold log probabilities (of either model) `gap_from_gold` floored."""
    both = (summary["drafter_logprob"], summary["verifier_logprob"])
    return sum(int(floor_logprobs(values, floor).hits.sum()) for values in both)


def deferral_risk(defer: Tensor, drafter_loss: Tensor, verifier_loss: Tensor, alpha: float) -> Tensor:
    """L_def(r) = (1 - r) l(q) + r (l(p) + alpha): a deferral costs a verifier call. Equation (3), [..]."""
    return torch.where(defer, verifier_loss + alpha, drafter_loss)


def speculative_risk(
    defer: Tensor, drafter_loss: Tensor, verifier_loss: Tensor, tv: Tensor, alpha: float
) -> Tensor:
    """L_spec(r) = (1 - r) l(q) + r (l(p) + alpha D_TV): it costs a possible rejection. Equation (8), [..]."""
    return torch.where(defer, verifier_loss + alpha * tv, drafter_loss)


def optimal(gap: Tensor, tv: Tensor | float, alpha: float) -> Tensor:
    """r* = 1[gap > alpha tv]. Lemma 4, equation (9); with tv = 1 it is Lemma 1, equation (4). bool [..]."""
    return gap > alpha * tv


def regret(gap: Tensor, tv: Tensor | float, defer: Tensor, alpha: float) -> Tensor:
    """L_spec(r) - min L_spec = |gap - alpha tv| 1[r != r*], never negative, [..]."""
    margin = gap - alpha * tv
    return margin.abs() * (defer != optimal(gap, tv, alpha))


def hindsight_excess(gold_gap: Tensor, tv: Tensor | float, defer: Tensor, alpha: float) -> Tensor:
    """Excess over the best decision in hindsight, per gold token: `regret` with the observed gap.

    No estimate of regret: the per-token minimum is below the minimum of the expectation, so that this is
    biased upwards. Differences between rules on the same tokens are unbiased; use those.
    """
    return regret(gold_gap, tv, defer, alpha)


def lemma5_bound(q: Tensor, p: Tensor, truth: Tensor) -> Tensor:
    """max_v |P(v) - q(v)| + max_v |P(v) - p(v)|: bounds OPT's regret under zero_one loss. Lemma 5, [..]."""
    return (truth - q).abs().amax(dim=-1) + (truth - p).abs().amax(dim=-1)


def emitted_risk(pi: Tensor, truth: Tensor) -> Tensor:
    """E_P[1 - pi(y)]: risk of the emitted token, comparable across families of rules, [..].

    At temperature 0 pi is a one-hot, and this is P(y != emitted). With one gold token pass its one-hot as
    truth.
    """
    return 1 - (truth * pi).sum(dim=-1)


def _check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise InputError(f"loss is {loss!r}; use one of {', '.join(LOSSES)}")
