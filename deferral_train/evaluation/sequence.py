"""Sequence labels in evaluation: decoded quality by the labels' metrics, and what traces predict of it.

P prompts, M metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deferral_train.collecting.first_look import CorpusMetric
from deferral_train.rules.token_gap import price as token_price
from deferral_train.rules.verify import Origin
from deferral_train.traces import Traces
from deferral_train.traces.schema import SEQUENCE_GAP, SEQUENCE_GAPS
from deferral_train.traces.sequence import TOKEN_LABEL, labelled_rows, sequence_summary


@dataclass(frozen=True)
class Decoded:
    """Quality and cost of decoding prompts with one setting of a rule.

    Attributes:
        calls: verifier calls per emitted token.
        scores: metric to mean score (of a corpus metric the corpus's).
        words: per text.
    """

    calls: float
    scores: dict[str, float]
    words: float


def score_decoded(rows: Sequence[Mapping[str, Any]], scorers: Mapping[str, Any]) -> Decoded:
    """Calls, scores and length of one rule's lines of ``outputs.jsonl``, first repetition."""
    own = [row for row in rows if row["repetition"] == 0]
    texts, references = [row["text"] for row in own], [row.get("reference") for row in own]
    calls = sum(row["counts"]["verifier_calls"] for row in own)
    emitted = sum(row["counts"]["emitted"] for row in own)
    return Decoded(
        calls / emitted,
        {name: mean_score(scorer, texts, references) for name, scorer in scorers.items()},
        float(np.mean([len(text.split()) for text in texts])),
    )


def mean_score(scorer: Any, texts: Sequence[str], references: Sequence[str | None]) -> float:
    """Mean of a scorer over texts; of a corpus metric the score of the corpus, in [0, 1]."""
    if isinstance(scorer, CorpusMetric):
        return float(scorer.of_corpus(texts, references))  # type: ignore[attr-defined]
    return float(np.nanmean(scorer(texts, references)))


def composite_loss(
    decoded: Decoded, lossless: Decoded, metrics: Sequence[str], scales: Sequence[float]
) -> float:
    """Quality lost against lossless in the labels' own unit: the mean over metrics of the loss in their scales."""
    lost = [(lossless.scores[name] - decoded.scores[name]) / scale for name, scale in zip(metrics, scales)]
    return float(np.mean(lost))


@dataclass(frozen=True)
class Predicted:
    """Loss of a cascade's texts as predicted from traces along them, per text.

    Attributes:
        loss: under each metric, [P, M]: summed gaps of the kept places over the label share.
        composite: the same of the scaled mean over metrics, [P].
    """

    loss: np.ndarray
    composite: np.ndarray


def predicted_loss(traces: Traces) -> Predicted:
    """Sum of the gaps of kept places of every prompt, over the share that was labelled.

    Along a cascade's own text at temperature 0 each kept token moves the verifier's text behind it from one to the
    next, so that these gaps add up to what the whole text loses against the verifier's own.

    Args:
        traces: of the cascade's own text, with sequence labels.
    """
    kept = (traces.column("origin") == Origin.KEPT) & labelled_rows(traces).numpy()
    share = float(traces.manifest.labels["share"])
    prompts = traces.prompt_of_row
    # In the order of the traces' prompt_ids.
    places = {number: place for place, number in enumerate(np.unique(prompts))}
    at = np.array([places[number] for number in prompts[kept]], dtype=np.int64)
    table = traces.column(SEQUENCE_GAPS)[kept].astype(np.float64) / share
    loss = np.zeros((len(places), table.shape[1]))
    np.add.at(loss, at, table)
    composite = np.zeros(len(places))
    np.add.at(composite, at, traces.column(SEQUENCE_GAP)[kept].astype(np.float64) / share)
    return Predicted(loss, composite)


def counted_loss(
    own: Traces,
    verifier: Traces,
    text: Callable[[Sequence[int]], str],
    references: Mapping[str, str | None],
    scorers: Mapping[str, Any],
) -> np.ndarray:
    """Loss of a cascade's texts against the verifier's own, by scoring both as they stand: [P, M].

    Args:
        own: traces along the cascade's text.
        verifier: along the verifier's, of the same prompts.
        text: of tokens.
        references: by prompt id.
        scorers: by metric; of single texts.
    """
    names = own.prompt_ids
    texts = [_texts(part, text) for part in (verifier, own)]
    given = [references.get(name) for name in names]
    scores = [
        [scorer([part[name] for name in names], given) for scorer in scorers.values()] for part in texts
    ]
    return np.stack([best - kept for best, kept in zip(*scores)], axis=1)


def _texts(traces: Traces, text: Callable[[Sequence[int]], str]) -> dict[str, str]:
    """Text of every prompt that traces follow."""
    prompt, token = traces.prompt_of_row, traces.column("token")
    ids = traces.manifest.prompt_ids
    return {ids[number]: text(token[prompt == number].tolist()) for number in np.unique(prompt)}


def quantiles_of_estimates(traces: Traces, head: Any, levels: Sequence[float]) -> list[float]:
    """Alphas at which about these shares of the labelled places are kept, each decided by itself."""
    rows = labelled_rows(traces)
    named = TOKEN_LABEL if head.tokenwise else ("tv",)
    summary = sequence_summary(traces, [*dict.fromkeys([*head.features, *named])]).select(rows)
    of_tokens = [summary[name].double() for name in named[1:]]
    price = token_price(*of_tokens) if head.tokenwise else summary["tv"].double()
    ratio = head.gap(summary).double() / price.clamp_min(1e-6)
    found = torch.quantile(ratio, torch.tensor(list(levels), dtype=torch.float64))
    return [float(f"{value:.4g}") for value in found]
