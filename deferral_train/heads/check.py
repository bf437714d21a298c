"""Contract test of a deferral head, run on summaries of random distributions; user-defined heads must pass it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.features import check_stage
from deferral_train.rules.learned import LearnedRule
from deferral_train.rules.summary import CONTEXT_FIELDS, FIELDS, Summary, summarize

ROWS, VOCABULARY = 48, 11


def check_head(head: DeferralHead) -> None:
    """Raise InputError naming the first promise that ``head`` breaks.

    Checked: features are summary fields that its stage may see; shapes follow the summary; rows do not
    influence each other; calls repeat; a missing field is refused by name; the rule it serves gives a distribution;
    save_pretrained and from_pretrained give the same decisions, tensors and config.
    """
    unknown = [name for name in head.features if name not in FIELDS]
    _require(not unknown, f"features {', '.join(unknown)} are no summary fields")
    check_stage(head.features, head.stage)
    head = head.eval()
    summary = example_summary(head)
    decide = decision_of(head)
    whole = decide(summary)
    _require(whole.shape == summary.shape, f"output has shape {list(whole.shape)}, not {list(summary.shape)}")
    _require(torch.equal(whole, decide(summary)), "two calls on one summary differ")
    _check_rows(decide, summary, whole)
    _check_missing(head, decide, summary)
    _check_artifact(head, summary, whole)


def example_summary(head: DeferralHead) -> Summary:
    """A summary over random distributions with every field that the head reads, and tv."""
    generator = torch.Generator().manual_seed(0)
    drafter, verifier = (2 * torch.randn(ROWS, VOCABULARY, generator=generator) for _ in range(2))
    token = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    summary = summarize(drafter, verifier, token=token)
    context: dict[str, Tensor] = {}
    for name in set(head.features) & CONTEXT_FIELDS:
        width = head.inputs.widths.get(name)
        context[name] = torch.randn(ROWS, width, generator=generator) if width else torch.arange(ROWS)
    return summary.with_fields(context)


def decision_of(head: DeferralHead) -> Callable[[Summary], Tensor]:
    """Function from a summary to decision values: the head's ``defer`` at alpha 0.1, or ``gap`` where it has none."""
    own = getattr(head, "defer", None)
    return head.gap if own is None else lambda summary: own(summary, 0.1)


def _check_rows(decide: Callable[[Summary], Tensor], summary: Summary, whole: Tensor) -> None:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    shuffled = decide(summary.select(order)).float()
    close = torch.allclose(shuffled, whole[order].float(), rtol=1e-4, atol=1e-5)
    _require(close, "rows influence each other: shuffled rows give other outputs")


def _check_missing(head: DeferralHead, decide: Callable[[Summary], Tensor], summary: Summary) -> None:
    for name in head.features:
        fewer = Summary({other: summary[other] for other in summary.names if other != name})
        try:
            decide(fewer)
        except InputError as error:
            _require(name in str(error), f"the error about a missing {name} does not name it")
        else:
            raise InputError(f"head {head.head_type}: it claims to read {name} but runs without it")


def _check_artifact(head: DeferralHead, summary: Summary, whole: Tensor) -> None:
    distribution = LearnedRule(head=head, alpha=0.1).defer(summary)
    _require(distribution.dtype == torch.bool, "its rule does not give booleans")
    with tempfile.TemporaryDirectory() as folder:
        head.save_pretrained(folder)
        again = type(head).from_pretrained(folder)
    _require(again.config == head.config, "the stored config differs")
    _require(torch.equal(decision_of(again)(summary), whole), "the stored head decides otherwise")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise InputError(f"head contract: {problem}")
