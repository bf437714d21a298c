"""Operators that a head adds to a block: on a GPU each is a launch, and beside small models they are what it costs."""

from __future__ import annotations

from typing import Any

import torch
from heads.distributions import shaken
from torch.utils._python_dispatch import TorchDispatchMode

from deferral_train.heads import GapHead, JudgeHead
from deferral_train.rules.learned import LearnedRule
from deferral_train.rules.summary import Summary, summarize
from deferral_train.training.config import DRAFT_FEATURES, VERIFY_FEATURES

DRAFTS = 5
VERIFY_STAGE, DRAFT_STAGE = 20, 16  # of a default head and its rule, from a summary to a decision


class Operators(TorchDispatchMode):
    """Names of the operators that run within, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operator.is_view and operator.name() not in ("aten::detach", "aten::_unsafe_view"):
            self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def block() -> Summary:
    """What a rule reads of a block of five drafted tokens, batch 1."""
    generator = torch.Generator().manual_seed(0)
    drafter, verifier = (2 * torch.randn(1, DRAFTS, 50, generator=generator) for _ in range(2))
    place = torch.arange(DRAFTS)[None]
    return summarize(drafter, verifier).with_fields({"position": place + 40, "draft_position": place})


def operators_of(rule: LearnedRule) -> list[str]:
    summary = block()
    with Operators() as counted:
        rule.defer(summary)
    return counted.names


def test_a_default_head_decides_in_few_operators() -> None:
    names = operators_of(LearnedRule(head=shaken(GapHead(VERIFY_FEATURES)), alpha=0.1))
    assert 10 < len(names) <= VERIFY_STAGE, names


def test_a_default_head_of_the_draft_stage_decides_in_few_operators() -> None:
    head = shaken(GapHead(DRAFT_FEATURES, stage="draft"))
    summary = block()
    with Operators() as counted:
        head.gap(summary)
    assert 10 < len(counted.names) <= DRAFT_STAGE, counted.names


def test_a_judge_scores_in_few_operators() -> None:
    head = shaken(JudgeHead(DRAFT_FEATURES, stage="draft"))
    summary = block()
    with Operators() as counted:
        head.score(summary)
    assert 5 < len(counted.names) <= DRAFT_STAGE, counted.names
