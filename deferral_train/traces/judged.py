"""Labels of judged tokens: may the drafter's argmax stand although the verifier's text has another?

The judged token of a row is the drafter's argmax v_q; rows where it is the text's own token need no judgement.
Scores (``judge_score``) are made by `collect --labels`; the label is 1[score > tau]. N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.traces.kinds import JUDGE_LABELS
from deferral_train.traces.reader import Traces
from deferral_train.traces.schema import JUDGED_COLUMN
from deferral_train.traces.sequence import sequence_gap

HINT = "judge:rate=0.3 (share of judged tokens that are acceptable) or judge:tau=-2 (nats)"


def is_judge(truth: str) -> bool:
    """True for a truth of judged tokens: ``judge``, ``judge:tau=X``, ``judge:rate=R``, ``judge:sequence=T``."""
    return truth == "judge" or truth.startswith("judge:")


def judges_sequences(truth: str) -> bool:
    """True for ``judge:sequence`` and ``judge:sequence=T``, which accept a token whose sequence gap is small."""
    return truth.partition("=")[0] == "judge:sequence"


def resolve_truth(truth: str, traces: Traces) -> str:
    """A truth as the fit traces fix it: ``judge:rate=R`` becomes ``judge:tau=X``; others stay.

    tau is the (1 - R) quantile of the scores of judged tokens, so that a share R of them is acceptable.

    Raises:
        InputError: no labels in the traces, a rate or tau that cannot be meant, no judged token.
    """
    if not is_judge(truth):
        return truth
    name, value = _setting(truth, traces)
    if name == "sequence":
        return f"judge:sequence={value!r}"
    if name == "tau":
        return f"judge:tau={value!r}"
    scores = traces.column(JUDGED_COLUMN)[judged_rows(traces).numpy()]
    if not len(scores):
        raise InputError(f"truth={truth!r}: the models agree on every token of these traces; collect more")
    tau = float(torch.from_numpy(scores.copy()).double().quantile(1 - value))
    return f"judge:tau={tau!r}"


def check_labels(labels: Sequence[Mapping[str, Any]]) -> None:
    """Refuse trace folders whose scores one tau cannot part.

    Args:
        labels: of each manifest, those that are fitted on first.

    Raises:
        InputError: labels of another kind, or another window.
    """
    first = labels[0]
    for own in labels[1:]:
        for name in ("kind", "window"):
            if own.get(name) != first.get(name):
                raise InputError(
                    f"labels: {name} is {own.get(name)} in one trace folder and {first.get(name)} in the first; "
                    "collect all with the same --labels"
                )


def judged_rows(traces: Traces) -> Tensor:
    """Rows whose drafter favours another token than the verifier, bool [N]."""
    tops = traces.summary(["drafter_argmax", "verifier_argmax"])
    return tops.drafter_argmax != tops.verifier_argmax


def acceptable(traces: Traces, truth: str) -> Tensor:
    """1[score > tau] of every row, bool [N]; True where nothing is judged.

    Raises:
        InputError: a truth without a tau, or traces without labels.
    """
    name, tau = _setting(truth, traces)
    if name == "sequence":
        return (sequence_gap(traces) <= tau) | ~judged_rows(traces)
    if name != "tau":
        raise InputError(
            f"truth={truth!r}: a rate is of the fit traces; resolve it there, or give judge:tau=X"
        )
    scores = torch.from_numpy(traces.column(JUDGED_COLUMN).copy())
    return (scores > tau) | ~judged_rows(traces)


def _setting(truth: str, traces: Traces) -> tuple[str, float]:
    """(``"tau"``, ``"rate"`` or ``"sequence"``, value); AutoJudge's scores are +1 and -1, so that their tau is 0."""
    if judges_sequences(truth):
        return "sequence", _tolerance(truth)
    kind = traces.manifest.labels.get("kind")
    if kind not in JUDGE_LABELS:
        raise InputError(
            f"truth={truth!r}: these traces hold no judge labels; collect with --labels selfjudge or autojudge"
        )
    if truth == "judge" and kind == "autojudge":
        return "tau", 0.0
    name, equals, text = truth.removeprefix("judge").removeprefix(":").partition("=")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if name not in ("tau", "rate") or not equals or not math.isfinite(value):
        raise InputError(f"truth={truth!r}: {kind} scores need a finite threshold; write {HINT}")
    if name == "rate" and not 0 < value < 1:
        raise InputError(f"truth={truth!r}: rate must lie between 0 and 1; write {HINT}")
    return name, value


def _tolerance(truth: str) -> float:
    """T of ``judge:sequence=T``: the largest sequence gap that is acceptable; 0 where none is given."""
    _, equals, text = truth.partition("=")
    try:
        value = float(text) if equals else 0.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"truth={truth!r}: write judge:sequence, or judge:sequence=0.02 (largest gap to accept)"
        )
    return value
