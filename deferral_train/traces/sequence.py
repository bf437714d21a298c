"""Sequence labels of traces: what a finished text loses where the drafter's token is kept. N rows, M metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.summary import TOKEN_FIELDS, Summary
from deferral_train.traces.kinds import SEQUENCE_LABELS
from deferral_train.traces.reader import Traces
from deferral_train.traces.schema import (
    SEQUENCE_ERROR,
    SEQUENCE_GAP,
    SEQUENCE_LOGPROBS,
    SEQUENCE_TOKEN,
    SEQUENCE_WORDS,
)

SEQUENCE = "sequence"  # the truth, or sequence:length=X with a price on length
TOKEN_LABEL = ("token", "drafter_logprob", "verifier_logprob")
FEWEST = 20  # labelled places that anything can be fitted on


def has_labels(traces: Traces) -> bool:
    """True where these traces hold sequence labels."""
    return bool(traces.manifest.labels.get("kind") == SEQUENCE_LABELS)


def is_sequence(truth: str) -> bool:
    """True for a truth of sequence labels: ``sequence``, or ``sequence:length=X``."""
    return truth == SEQUENCE or truth.startswith(SEQUENCE + ":")


def length_price_of(truth: str) -> float:
    """X of ``sequence:length=X``; 0 for ``sequence``.

    Raises:
        InputError: anything else behind the colon.
    """
    name, equals, text = truth.removeprefix(SEQUENCE).removeprefix(":").partition("=")
    try:
        price = float(text) if equals else 0.0
    except ValueError:
        price = math.nan
    if (equals and name != "length") or (name and not equals) or not math.isfinite(price):
        raise InputError(
            f"truth={truth!r}: write sequence, or sequence:length=0.1 (what a deviation of length counts)"
        )
    return price


def labelled_rows(traces: Traces) -> Tensor:
    """Rows that carry a sequence label, bool [N].

    Raises:
        InputError: traces without such labels.
    """
    return ~torch.isnan(sequence_gap(traces))


def sequence_gap(traces: Traces, length_price: float = 0.0) -> Tensor:
    """The sequence gap of every row, float32 [N], NaN where not labelled.

    With one metric in its unit, else the mean over metrics of gaps in deviations of each.

    Args:
        length_price: what a deviation of the words that keeping v_q adds counts besides; above 0 keeping longer
            texts costs more, below 0 keeping shorter ones.

    Raises:
        InputError: traces without sequence labels.
    """
    if not has_labels(traces):
        kind = traces.manifest.labels.get("kind")
        have = f"labels of {kind}" if kind else "no labels"
        raise InputError(f"truth='sequence': these traces hold {have}; collect with --labels sequence")
    gap = torch.from_numpy(traces.column(SEQUENCE_GAP).copy())
    return gap + length_price * length_change(traces) if length_price else gap


def sequence_summary(traces: Traces, fields: Iterable[str], temperature: float | None = None) -> Summary:
    """As :meth:`Traces.summary`, with the fields about one token speaking of the labelled token.

    That is the drafted token of a token label, and v_q of a position label.
    """
    if traces.manifest.labels.get("form") != "token":
        return argmax_summary(traces, fields, temperature)
    names = list(fields)
    known = traces.summary([name for name in names if name not in TOKEN_FIELDS], temperature)
    columns = dict(zip(TOKEN_LABEL, (SEQUENCE_TOKEN, *SEQUENCE_LOGPROBS)))
    return Summary(
        {
            name: torch.from_numpy(traces.column(columns[name]).copy()) if name in columns else known[name]
            for name in names
        }
    )


def argmax_summary(traces: Traces, fields: Iterable[str], temperature: float | None = None) -> Summary:
    """As :meth:`Traces.summary`, with the fields about one token speaking of the drafter's argmax v_q."""
    names = list(fields)
    read = [name for name in names if name not in TOKEN_FIELDS]
    known = traces.summary(
        [*read, "drafter_argmax", "drafter_max", "verifier_at_drafter_argmax"], temperature
    )
    columns = {
        "token": known.drafter_argmax,
        "drafter_logprob": known.drafter_max.log(),
        "verifier_logprob": known.verifier_at_drafter_argmax.clamp_min(1e-38).log(),
    }
    return Summary({name: columns[name] if name in TOKEN_FIELDS else known[name] for name in names})


def length_change(traces: Traces) -> Tensor:
    """Words that keeping v_q adds to the finished text, in deviations of them over the labelled rows, [N]."""
    words = torch.from_numpy(traces.column(SEQUENCE_WORDS).copy())
    told = words[~torch.isnan(words)]
    scale = traces.manifest.labels.get("drift", {}).get("deviation") or float(told.std(correction=0))
    return words / scale if scale else torch.zeros_like(words)


def sequence_error(traces: Traces) -> Tensor:
    """Standard error of each gap [N]: 0 at temperature 0, NaN where not labelled or where one sample cannot tell."""
    return torch.from_numpy(traces.column(SEQUENCE_ERROR).copy())


def check_one_kind(parts: Sequence[Traces]) -> None:
    """Refuse trace folders whose sequence labels do not mean the same, and too few labels.

    Raises:
        InputError: another verifier, temperature, metric, scale, form or reference; fewer than `FEWEST` labels.
    """
    first = _facts(parts[0])
    for part in parts[1:]:
        for name, value in _facts(part).items():
            if value != first[name]:
                raise InputError(
                    f"sequence labels: {name} is {value} in one trace folder and {first[name]} in the first; "
                    "collect all with the same --labels settings (--label-scales keeps the first one's scales)"
                )
    count = sum(int(labelled_rows(part).sum()) for part in parts)
    if count < FEWEST:
        raise InputError(
            f"sequence labels: {count} labelled places, at least {FEWEST} are needed; collect more prompts"
        )


def _facts(traces: Traces) -> Mapping[str, Any]:
    """Facts that the labels of one fit must share."""
    labels, pair = traces.manifest.labels, traces.manifest.pair
    verifier = pair.get("verifier")
    weights = verifier.get("weights") if isinstance(verifier, dict) else verifier
    names = ("kind", "metrics", "scales", "reference", "form")
    return {"verifier": weights, "temperature": traces.manifest.temperature} | {
        name: labels.get(name) for name in names
    }
