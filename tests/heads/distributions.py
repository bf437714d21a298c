"""Summaries and heads that the tests of heads share."""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.heads import (
    CostSensitiveHead,
    DeferralHead,
    GapHead,
    JudgeHead,
    PlugInHead,
    TokenHead,
    TruthMixtureHead,
)
from deferral_train.rules.summary import Summary, summarize

FEATURES = ("drafter_max:logit", "verifier_max", "tv", "drafter_entropy:log1p", "kl:sqrt")


def logits(rows: int, vocab: int = 9, seed: int = 0, sharp: float = 2.0) -> tuple[Tensor, Tensor]:
    """Drafter and verifier logits [rows, vocab] that agree in part."""
    generator = torch.Generator().manual_seed(seed)
    shared = sharp * torch.randn(rows, vocab, generator=generator)
    own = [torch.randn(rows, vocab, generator=generator) for _ in range(2)]
    return shared + own[0], shared + own[1]


def summary_of(rows: int = 200, **kwargs: float) -> Summary:
    return summarize(*logits(rows, **kwargs))


def shaken(head: DeferralHead, seed: int = 0) -> DeferralHead:
    """The head with weights away from their start, normalised on summaries, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if head.features and all(name in summary_of(2) for name in head.features):
        head.fit_normalisation([head.columns(summary_of(500, seed=9))])
    return head.eval()


def every_head() -> dict[str, DeferralHead]:
    """One of each kind, shaken."""
    heads: dict[str, DeferralHead] = {
        "gap": GapHead(FEATURES, hidden=(8,)),
        "gap_linear": GapHead(FEATURES, body="linear"),
        "gap_log": GapHead(FEATURES, loss="log", hidden=(8, 8)),
        "gap_platt": GapHead(FEATURES, recalibration="platt", hidden=(8,)),
        "gap_isotonic": GapHead(FEATURES, recalibration="isotonic", hidden=(8,)),
        "gap_draft": GapHead(("drafter_max:logit", "drafter_entropy"), stage="draft", hidden=(8,)),
        "cost_sensitive": CostSensitiveHead(FEATURES, hidden=(8,)),
        "cost_sensitive_draft": CostSensitiveHead(("drafter_max",), stage="draft", hidden=(8,)),
        "truth_mixture": TruthMixtureHead(FEATURES, body="linear"),
        "token": TokenHead(FEATURES, hidden=(8,)),
        "token_prob": TokenHead(FEATURES, loss="prob", body="linear"),
        "judge": JudgeHead(FEATURES),
        "judge_draft": JudgeHead(
            ("drafter_max:logit", "drafter_entropy"), stage="draft", body="mlp", hidden=(8,)
        ),
        "plug_in": PlugInHead(recalibration="platt"),
    }
    return {name: shaken(head) for name, head in heads.items()}
