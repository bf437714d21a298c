"""Where to set a judge's threshold: on labelled calibration traces, apart from those that it was fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deferral_train.errors import InputError
from deferral_train.heads.judge import JudgeHead
from deferral_train.heads.pairing import check_vocabulary
from deferral_train.traces import Traces
from deferral_train.traces.judged import acceptable, judged_rows
from deferral_train.traces.sequence import argmax_summary

CHOICES = ("recall", "f1")


@dataclass(frozen=True)
class JudgePoint:
    """A threshold and what it does on the calibration rows.

    Attributes:
        threshold: theta; a token is approved iff its score > theta.
        recall: share of acceptable tokens that are approved.
        precision: share of approved tokens that are acceptable; 1 where none is approved.
        specificity: share of important tokens that are not approved.
        f1: of the acceptable class.
        rows: judged rows.
    """

    threshold: float
    recall: float
    precision: float
    specificity: float
    f1: float
    rows: int


def choose_threshold(head: JudgeHead, traces: Traces, truth: str, by: str = "f1") -> JudgePoint:
    """The threshold of the best F1 of acceptable tokens (``f1``), or of the best mean recall of both classes
    (``recall``).

    SelfJudge names its variants F and R. Recall of acceptable tokens alone is best at threshold 0, where everything
    passes, so that R is taken as the mean over both classes, the balanced accuracy.

    Args:
        head: of the verify stage.
        traces: with judge labels; prompts that the head was not fitted on.
        truth: ``judge:tau=X`` of the head's training, or ``judge`` on AutoJudge's labels.
        by: one of `CHOICES`.

    Raises:
        InputError: an unknown choice, a head of the other stage or vocabulary, labels of one class.
    """
    if by not in CHOICES:
        raise InputError(f"by={by!r}: use one of {', '.join(CHOICES)}")
    points = sweep(head, traces, truth)
    return max(points, key=lambda p: p.f1 if by == "f1" else p.recall + p.specificity)


def sweep(head: JudgeHead, traces: Traces, truth: str) -> list[JudgePoint]:
    """Every threshold that splits the judged rows differently, ascending; arguments and errors as above."""
    if not isinstance(head, JudgeHead) or head.stage != "verify":
        kind = f"{getattr(head, 'head_type', type(head).__name__)} head of stage {getattr(head, 'stage', None)!r}"
        raise InputError(f"head: a {kind} judges no tokens; give a judge head of stage 'verify'")
    check_vocabulary(head, traces.manifest.pair)
    rows = judged_rows(traces)
    scores = head.score(argmax_summary(traces, head.features).select(rows)).double().numpy()
    good = acceptable(traces, truth)[rows].numpy()
    if not good.any() or good.all():
        raise InputError(
            f"truth={truth!r}: labels of the calibration traces are of one class; collect more prompts"
        )
    order = np.argsort(-scores, kind="stable")
    passed = np.cumsum(good[order])
    approved = np.arange(1, len(order) + 1)
    # Approving the first k by score takes a threshold between the k-th and the next.
    following = np.append(scores[order][1:], 0.0)
    ends = np.flatnonzero(scores[order] > following)
    thresholds = [1.0, *np.maximum((scores[order] + following) / 2, 0.0)[ends].tolist()]
    hits = [0, *passed[ends].tolist()]
    counts = [0, *approved[ends].tolist()]
    points = [
        _point(threshold, hit, count, int(good.sum()), len(good))
        for threshold, hit, count in zip(thresholds, hits, counts)
    ]
    return points[::-1]


def _point(threshold: float, hits: int, approved: int, positives: int, rows: int) -> JudgePoint:
    recall = hits / positives
    precision = hits / approved if approved else 1.0
    specificity = 1 - (approved - hits) / (rows - positives)
    return JudgePoint(threshold, recall, precision, specificity, 2 * hits / (approved + positives), rows)
