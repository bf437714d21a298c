"""Labels: the loss gap E_P[l(y, q) - l(y, p)] of every row, under each notion of the true distribution P."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import risks
from deferral_train.traces.judged import acceptable, is_judge
from deferral_train.traces.reader import Traces
from deferral_train.traces.sequence import is_sequence, length_price_of, sequence_gap

TRUTHS = ("reference", "verifier", "teacher", "exact", "sequence")
_EXPECTED_FIELDS = ("verifier_max", "verifier_at_drafter_argmax", "kl", "verifier_sum_squares", "product_sum")
_GOLD_FIELDS = ("drafter_max", "drafter_argmax", "verifier_argmax", "drafter_logprob", "verifier_logprob")
# loss -> (drafter column, verifier column, sign): gap = sign * (drafter - verifier)
_TRUTH_TERMS = {
    "zero_one": ("truth_drafter_argmax", "truth_verifier_argmax", -1.0),  # l(v, q) = 1 - P(v_q)
    "log": ("truth_drafter_log", "truth_verifier_log", 1.0),  # E_P -log q
    "prob": ("truth_drafter_prob", "truth_verifier_prob", -1.0),  # 1 - sum P q
}


def gap(traces: Traces, truth: str = "reference", loss: str = "zero_one") -> Tensor:
    """The loss gap of every row, float32 [N], in units of the loss (nats for ``log``).

    Args:
        truth: ``reference`` one gold token (unbiased, noisy); ``verifier`` P := p in closed form;
            ``teacher`` and ``exact`` the distribution logged in the truth group; ``sequence`` what becomes of the
            finished text, NaN where not labelled (:mod:`~deferral_train.traces.sequence`).
        loss: ``zero_one``, ``log`` or ``prob``; ``sequence`` has one of its own.

    Raises:
        InputError: a truth that these traces do not hold, or an unknown name.
    """
    if is_sequence(truth):
        return sequence_gap(traces, length_price_of(truth))
    if truth not in TRUTHS or loss not in risks.LOSSES:
        names = f"one of {', '.join(TRUTHS)} and one of {', '.join(risks.LOSSES)}"
        raise InputError(f"truth={truth!r}, loss={loss!r}: use {names}")
    if truth == "reference":
        return _from_gold(traces, loss)
    if truth == "verifier":
        return risks.expected_gap(traces.summary(_EXPECTED_FIELDS), loss)
    return _from_truth_group(traces, truth, loss)


def label(
    traces: Traces, truth: str = "reference", loss: str = "zero_one", temperature: float | None = None
) -> Tensor:
    """The target that a head is fitted to, float32 [N]: :func:`gap`, or the label of a judge head.

    Args:
        truth: as for `gap`; or ``judge:tau=X``, 1 where the drafter's argmax was judged not acceptable, else 0
            (:mod:`~deferral_train.traces.judged`); or ``acceptance``, :func:`rejection`.
        temperature: of the sampling distributions, for ``acceptance``; None is the manifest's.
    """
    if is_judge(truth):
        return (~acceptable(traces, truth)).float()
    return rejection(traces, temperature) if truth == "acceptance" else gap(traces, truth, loss)


def rejection(traces: Traces, temperature: float | None = None) -> Tensor:
    """Chance [N] that the exact check rejects a drafted token: 1 - min(1, p(x)/q(x)), SpecDec++'s soft label.

    Of the logged token where the drafter wrote the text, sampled at temperature 1 (the distributions that are
    logged); else its mean over drafted tokens, E_{x~q} max(0, 1 - p(x)/q(x)) = D_TV(p, q), which at temperature 0
    is the label itself: 1 where the argmaxes differ.

    Args:
        temperature: of the sampling distributions; None is the manifest's.
    """
    used = traces.manifest.temperature if temperature is None else temperature
    if traces.manifest.prefixes != "drafter" or not used == traces.manifest.temperature == 1:
        return traces.summary(["tv"], temperature).tv
    logs = traces.summary(["drafter_logprob", "verifier_logprob"])
    return (1 - (logs.verifier_logprob - logs.drafter_logprob).exp()).clamp(0, 1)


def _from_gold(traces: Traces, loss: str) -> Tensor:
    gold = torch.from_numpy(traces.column("gold").astype(np.int64))  # a copy: a mapped column is read-only
    if bool((gold < 0).any()):
        raise InputError(
            f"truth='reference': prefixes are {traces.manifest.prefixes!r}, rows without a gold token; "
            "use truth='verifier', or collect with --prefixes reference"
        )
    # Teacher-forced on references the logged token is the gold one, so its log-probabilities are stored.
    return risks.gap_from_gold(traces.summary(_GOLD_FIELDS).with_fields({"token": gold}), loss)


def _from_truth_group(traces: Traces, truth: str, loss: str) -> Tensor:
    logged = traces.manifest.truth
    if logged != truth:
        have = f"the {logged} distribution" if logged else "no distribution of their own"
        raise InputError(
            f"truth={truth!r}: these traces log {have}; use reference or verifier, or collect with one"
        )
    drafter, verifier, sign = _TRUTH_TERMS[loss]
    return sign * torch.from_numpy(traces.column(drafter) - traces.column(verifier))
