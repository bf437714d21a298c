"""Training objectives of heads: functions of (head, batch, generator) that give the scalar loss to minimise.

A batch is a dictionary of tensors over N rows: ``x`` raw columns [N, C], ``z`` unbiased label of the gap,
``tv`` exact total variation; where asked for also ``reject`` (probability that the drafted token is
rejected), ``target`` (0 where gold is v_p, 1 where it is v_q and not v_p, 2 else), ``gold_drafter
gold_verifier`` (q and p of gold) and logged candidates (:data:`CANDIDATES`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.judge import JudgeHead
from deferral_train.heads.truth import TokenHead, TruthMixtureHead

Batch = Mapping[str, Tensor]
# [N, K] log q, log p of the logged union, whether an entry is the gold token, whether it is distinct and
# present, whether it is v_p or v_q; [N] log tail masses.
CANDIDATES = (
    "cand_drafter",
    "cand_verifier",
    "cand_gold",
    "cand_valid",
    "cand_top",
    "tail_drafter",
    "tail_verifier",
)
ALPHA_RANGE = (0.0, 1.0)
REJECTED_WEIGHT = 6.0  # of the rejected class at the draft stage, as SpecDec++ publishes it


def squared(head: DeferralHead, batch: Batch, generator: torch.Generator) -> Tensor:
    """E (gap^ - z)^2, whose minimiser is E[z | features] = gap; at the draft stage plus tv and rejection."""
    out = head(batch["x"])
    loss = F.mse_loss(out["gap"], batch["z"])
    return loss + _draft_terms(out, batch) if head.stage == "draft" else loss


def huber(head: DeferralHead, batch: Batch, generator: torch.Generator) -> Tensor:
    """As :func:`squared` with errors above 1 counted linearly: for the heavy tails of the log loss
    (biased).
    """
    out = head(batch["x"])
    loss = F.huber_loss(out["gap"], batch["z"])
    return loss + _draft_terms(out, batch) if head.stage == "draft" else loss


def _draft_terms(out: Mapping[str, Tensor], batch: Batch) -> Tensor:
    loss = F.mse_loss(out["tv"], batch["tv"])
    if "reject" in batch:
        reject = out["reject"].float().clamp(1e-6, 1 - 1e-6)
        loss = loss + F.mse_loss(reject, batch["reject"])
    return loss


def draw_alpha(like: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh alphas of the shape of ``like``, uniform on :data:`ALPHA_RANGE`."""
    low, high = ALPHA_RANGE
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float32)
    return (low + (high - low) * drawn).to(like.device)


def cost_sensitive(head: DeferralHead, batch: Batch, generator: torch.Generator) -> Tensor:
    """E |z - alpha tv| log(1 + exp(-s (2 1[z > alpha tv] - 1))), s the score, alpha drawn afresh.

    A GapHead is scored by (gap^ - alpha tv) * 8: the same surrogate then trains one gap for every alpha.
    """
    alpha = draw_alpha(batch["z"], generator)
    margin = batch["z"] - alpha * batch["tv"]
    if head.takes_alpha:
        score = head(batch["x"], alpha)["score"]
    else:
        out = head(batch["x"])
        tv = out["tv"] if head.stage == "draft" else batch["tv"]
        score = 8 * (out["gap"] - alpha * tv)
    loss = (margin.abs() * F.softplus(-score * margin.sign())).mean()
    if head.stage == "draft" and not head.takes_alpha:
        loss = loss + _draft_terms(out, batch)
    return loss


def likelihood(head: DeferralHead, batch: Batch, generator: torch.Generator) -> Tensor:
    """-log P^(gold): of its class among v_p, v_q and the rest, and within the rest of the logged candidate
    or tail.

    The second term shares a and b with the first and needs the candidates; without them the first stands
    alone.
    """
    mixture = cast(TruthMixtureHead, _fitting(head, "likelihood"))
    classes = mixture.class_logits(batch["x"]).float()
    loss = F.cross_entropy(classes, batch["target"])
    if "cand_gold" not in batch:
        return loss
    a, b, _ = mixture.coefficients(batch["x"])
    weight = a.unsqueeze(-1) * batch["cand_verifier"] + b.unsqueeze(-1) * batch["cand_drafter"]
    usable = batch["cand_valid"] & ~batch["cand_top"]
    weight = weight.float().masked_fill(~usable, -1e4)
    tail = (a * batch["tail_verifier"] + b * batch["tail_drafter"]).float()
    logits = torch.cat([weight, tail.unsqueeze(-1)], dim=-1)
    hit = batch["cand_gold"] & usable
    place = torch.where(
        hit.any(-1), hit.int().argmax(-1), torch.full_like(batch["target"], logits.shape[-1] - 1)
    )
    within = F.cross_entropy(logits, place, reduction="none")
    return loss + (within * (batch["target"] == 2)).mean()


def candidates(head: DeferralHead, batch: Batch, generator: torch.Generator) -> Tensor:
    """Binary log loss of P^(v) against 1[v = gold], summed over a row's distinct logged candidates.

    Under loss prob also the log loss of E_P p(y), E_P q(y) against p(gold), q(gold), which are unbiased for
    them.
    """
    token = cast(TokenHead, _fitting(head, "candidates"))
    odds = token.log_odds(batch["x"], batch["cand_drafter"], batch["cand_verifier"]).float()
    each = F.binary_cross_entropy_with_logits(odds, batch["cand_gold"].float(), reduction="none")
    loss = (each * batch["cand_valid"]).sum(-1).mean()
    if token.loss == "prob":
        share = torch.stack([batch["gold_verifier"], batch["gold_drafter"]], dim=-1)
        loss = loss + F.binary_cross_entropy_with_logits(token.value_odds(batch["x"]).float(), share)
    return loss


def judge(head: DeferralHead, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean of :func:`judge_losses`."""
    each, weight = judge_losses(cast(JudgeHead, _fitting(head, "judge")), batch)
    return (weight * each).sum() / weight.sum().clamp_min(1)


def judge_losses(head: JudgeHead, batch: Batch) -> tuple[Tensor, Tensor]:
    """Binary log loss of the score against the soft label 1 - z, and each row's weight, ``[N]`` both.

    z is the chance that the token is not acceptable. At the verify stage rows count where the drafter's argmax is
    not the verifier's; at the draft stage all do, and the part of a label that is rejected is weighted by
    :data:`REJECTED_WEIGHT` (SpecDec++, arXiv 2405.19715).
    """
    x, label = batch["x"], 1 - batch["z"]
    odds = head.odds(x).float()
    harm = REJECTED_WEIGHT if head.stage == "draft" else 1.0
    each = -label * F.logsigmoid(odds) - harm * (1 - label) * F.logsigmoid(-odds)
    told = torch.ones_like(label) if head.stage == "draft" else head.inputs.column(x, "argmaxes_differ")
    return each, told


def _fitting(head: DeferralHead, objective: str) -> DeferralHead:
    """The head, or InputError where it does not state the objective."""
    if objective not in head.objectives:
        raise InputError(
            f"objective {objective!r} does not fit a {head.head_type} head; use objective='auto'"
        )
    return head


Objective = Callable[[DeferralHead, Batch, torch.Generator], Tensor]
OBJECTIVES: dict[str, Objective] = {
    "squared": squared,
    "huber": huber,
    "cost_sensitive": cost_sensitive,
    "likelihood": likelihood,
    "candidates": candidates,
    "judge": judge,
}


def objective_for(head: DeferralHead, name: str = "auto") -> str:
    """Name of the objective that a head is trained by: the first that it states for ``"auto"``, else ``name``.

    Raises:
        InputError: an unknown objective, or one that does not fit the head.
    """
    if name == "auto":
        return head.objectives[0]
    if name not in OBJECTIVES:
        raise InputError(f"objective {name!r} is unknown; known: auto, {', '.join(OBJECTIVES)}")
    _fitting(head, name)
    return name
