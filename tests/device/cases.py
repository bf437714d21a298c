"""Heads of every type and what is asked of them, on any device: shared by the suites and the tests on CUDA."""

from __future__ import annotations

from typing import Any

import torch

from deferral_train.heads import HEADS
from deferral_train.rules.summary import Summary, summarize
from deferral_train.training.config import DRAFT_FEATURES, VERIFY_FEATURES

ROWS, VOCABULARY = 24, 13
DRAFT_HEADS = ("gap", "judge", "cost_sensitive")
MEMORY = "memory_2"


def summary_on(device: str, dtype: torch.dtype = torch.float32) -> Summary:
    """A summary of random distributions whose logits lie on ``device``, with every context that heads read."""
    generator = torch.Generator().manual_seed(0)
    drafter, verifier = (2 * torch.randn(ROWS, VOCABULARY, generator=generator) for _ in range(2))
    token = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    previous = torch.randint(VOCABULARY, (3, ROWS), generator=generator)
    found = summarize(drafter.to(device, dtype), verifier.to(device, dtype), token=token.to(device))
    context: dict[str, Any] = {f"previous_token_{k + 1}": row.to(device) for k, row in enumerate(previous)}
    place = torch.arange(ROWS, device=device)
    return found.with_fields({**context, "position": place, "draft_position": place % 5})


def head_of(kind: str, stage: str, recalibration: str = "none", memory: bool = False) -> Any:
    """A head of that type with random weights; ``memory`` gives it counts of what followed the last tokens."""
    torch.manual_seed(3)
    if kind == "plug_in":
        return HEADS[kind](recalibration=recalibration).eval()  # type: ignore[call-arg]
    features = VERIFY_FEATURES if stage == "verify" else DRAFT_FEATURES
    loss = {"loss": "sequence_sampled"} if kind == "token_gap" else {}
    head = HEADS[kind](
        [*features, *([MEMORY] if memory else [])], stage=stage, recalibration=recalibration, **loss
    )
    if memory:
        here = summary_on("cpu")
        head.inputs.memory.fit(here, here["token"], head.inputs.orders)
    torch.nn.init.normal_(head.body[-1].weight)
    head.mean.normal_()
    return head.eval()


CASES = [
    (kind, stage)
    for kind in HEADS
    for stage in ("verify", "draft")
    if stage == "verify" or kind in DRAFT_HEADS
]


def answers(head: Any, summary: Summary) -> dict[str, torch.Tensor]:
    """Everything that rules and stops ask this head."""
    found = {}
    if not (head.head_type == "cost_sensitive" and head.stage == "draft"):
        found["gap"] = head.gap(summary)
    if head.head_type == "cost_sensitive":
        found["defer"] = head.defer(summary, 0.1)
    elif head.stage == "draft":
        found |= {"tv": head.tv(summary), "reject": head.reject(summary)}
    if head.head_type == "judge":
        found["score"] = head.score(summary)
    if head.head_type == "token_gap":
        logs = [torch.log_softmax(torch.linspace(0, 3, VOCABULARY), -1).expand(ROWS, -1) for _ in range(2)]
        found["costs"] = head.token_gap(None, *(one.to(summary["tv"].device) for one in logs), summary)
    if head.head_type in ("token", "truth_mixture"):
        logs = [torch.log_softmax(torch.linspace(0, 3, VOCABULARY), -1).expand(ROWS, -1) for _ in range(2)]
        found["truth"] = head.truth(*(one.to(summary["tv"].device) for one in logs), summary)
        found["value"] = head.verifier_value(summary)
    return found
