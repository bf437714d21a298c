"""A first look at sequence labels: some prompts labelled before the manifest is written.

It gives what must be fixed before the first shard: each metric's deviation, the corpus that linearised corpus metrics
are taken at, how lengths drift; and what the whole will cost. The prompts are drawn by seed, so that every process, and
a run that goes on later, finds the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from deferral_train.collecting.batches import BatchCollector
from deferral_train.collecting.plan import CollectionPlan, duration
from deferral_train.collecting.sequence import Score, prompt_seed
from deferral_train.collecting.sequence_labels import SequenceLabels
from deferral_train.errors import InputError
from deferral_train.traces.schema import SEQUENCE_GAPS, SEQUENCE_WORDS

PROMPTS = 128  # deviations are then known to a few per cent
FEWEST = 8  # labelled places that a deviation can be taken of
LOOK_SEED = "first look"


@runtime_checkable
class CorpusMetric(Protocol):
    """A metric of a whole corpus, made one of single texts by :meth:`at`."""

    def at(self, texts: Sequence[str], references: Sequence[str | None]) -> Score:
        """Scores of one text in the place of one of these; differences of them are what the corpus score loses."""
        ...


@dataclass(frozen=True)
class Look:
    """Labels of a few prompts, made before the rest to fix scales and tell the cost.

    Attributes:
        prompts: looked at.
        places: labelled.
        tokens: generated to finish their texts.
        seconds: that it took.
        gaps: of each place and metric, [n, M].
        words: how much longer the text of v_q is, [n].
        scores: scorers, those of a corpus bound to the path's.
    """

    prompts: int
    places: int
    tokens: int
    seconds: float
    gaps: np.ndarray
    words: np.ndarray
    scores: Mapping[str, Score]

    def scales(self, metrics: Sequence[str]) -> list[float]:
        """Deviation of each metric's gaps; 1 for a metric alone, whose gaps keep their unit.

        Raises:
            InputError: too few places, or a metric that no swap changes.
        """
        if len(metrics) == 1:
            return [1.0]
        if len(self.gaps) < FEWEST:
            raise InputError(
                f"labels='sequence': {len(self.gaps)} labelled places in {self.prompts} prompts are too few to weigh "
                f"{len(metrics)} metrics; give more prompts, label_share=1, one metric or label_scales"
            )
        deviations = np.nanstd(self.gaps, axis=0)
        for name, deviation in zip(metrics, deviations):
            if not deviation > 0:
                raise InputError(
                    f"label_metric {name}: no swap changes it in {self.prompts} prompts; leave it out or give more"
                )
        return [float(f"{value:.6g}") for value in deviations]

    def drift(self) -> dict[str, float]:
        """Mean words that keeping v_q adds, and their deviation."""
        found = {"words": np.mean(self.words), "deviation": np.std(self.words)} if len(self.words) else {}
        return {name: float(f"{value:.6g}") for name, value in found.items()}


@torch.inference_mode()
def first_look(collector: BatchCollector, plan: CollectionPlan, prompts: int = PROMPTS) -> Look:
    """Label some prompts of a plan.

    Args:
        collector: with the labels that are to be made.
        plan: the work.
        prompts: most to look at.
    """
    labels = collector.sequence
    assert labels is not None
    began = time.perf_counter()
    generator = np.random.default_rng(prompt_seed(plan.manifest.seed, "", LOOK_SEED))
    chosen = generator.permutation(len(plan.prompts))[:prompts].tolist()
    chosen.sort(key=lambda number: (len(plan.prompts[number].input_ids), number))
    batches = [chosen[at : at + 32] for at in range(0, len(chosen), 32)]
    seed = prompt_seed(plan.manifest.seed, "", LOOK_SEED) % 2**32
    paths = [collector.continuations(batch, seed) for batch in batches]
    texts = [
        collector.pair.tokenizer.decode(row, skip_special_tokens=True)
        for path in paths
        for row in path.tokens
    ]
    references = [labels.references.get(plan.prompts[number].id) for batch in batches for number in batch]
    scores = bind(labels.scores, texts, references)
    looking = labels.with_scales(labels.settings.scales, scores)
    collector.sequence = looking
    found = [collector.follow(batch, path).labels for batch, path in zip(batches, paths)]
    collector.sequence = labels
    gaps, words = (
        torch.cat([one[name] for one in found]).cpu().double().numpy()
        for name in (SEQUENCE_GAPS, SEQUENCE_WORDS)
    )
    told = ~np.isnan(words)
    return Look(
        len(chosen), int(told.sum()), looking.tally.tokens, time.perf_counter() - began,
        gaps[told], words[told], scores,
    )  # fmt: skip


def bind(
    scores: Mapping[str, Any], texts: Sequence[str], references: Sequence[str | None]
) -> dict[str, Score]:
    """Scorers of single texts; corpus metrics are taken at this corpus."""
    return {
        name: one.at(texts, references) if isinstance(one, CorpusMetric) else one
        for name, one in scores.items()
    }


def has_corpus_metric(labels: SequenceLabels) -> bool:
    """True where a metric is a corpus score, linearised at the corpus of the path."""
    return any(isinstance(one, CorpusMetric) for one in labels.scores.values())


def needs_look(labels: SequenceLabels, scales: Sequence[float]) -> bool:
    """True where scales or a corpus must be fixed before the first shard."""
    return has_corpus_metric(labels) or (len(labels.settings.metrics) > 1 and not scales)


def cost(look: Look, plan: CollectionPlan) -> str:
    """Announces places, generated tokens and hours of the whole plan, projected from a first look."""
    times = len(plan.prompts) / look.prompts
    return (
        f"collect: about {look.places * times:,.0f} places to label in {len(plan.prompts):,} prompts, "
        f"{look.tokens * times:,.0f} tokens to generate, {duration(look.seconds * times)} on one process here "
        f"({look.prompts} prompts looked at: {look.places} places, {look.tokens:,} tokens, {look.seconds:.0f} s)"
    )
