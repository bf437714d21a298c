"""Before the first shard of a collection with sequence labels: checks settings, fixes scales, tells the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from deferral_train.collecting.batches import BatchCollector
from deferral_train.collecting.config import ON_POLICY_TOKENS, CollectConfig
from deferral_train.collecting.first_look import cost, first_look, has_corpus_metric, needs_look
from deferral_train.collecting.plan import CollectionPlan
from deferral_train.collecting.sequence_labels import LabelSettings, SequenceLabels
from deferral_train.collecting.sequence_sampling import LabelSampling
from deferral_train.errors import InputError
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces.folder import open_folder
from deferral_train.traces.manifest import HEADER, read_header

LOOKED = ("scales", "drift", "looked_at")  # what a first look adds to the labels of a manifest


def label_sequences(
    config: CollectConfig,
    collector: BatchCollector,
    plan: CollectionPlan,
    prompts: Sequence[Prompt],
    scores: Mapping[str, Any] | None,
    out: str = "",
    tell: bool = False,
    say: bool = False,
) -> CollectionPlan:
    """Have a collector make sequence labels; the plan comes back with scales and length drift in its manifest.

    Args:
        config: of the collection.
        collector: gets the labels.
        plan: the work.
        prompts: as read, with their references.
        scores: a scorer for each metric.
        out: the trace folder; where it was begun, its scales stand.
        tell: look at some prompts to say what all will cost, even where nothing else needs it.
        say: say it where such a look was needed anyway.

    Raises:
        InputError: a metric without a scorer, references that are missing, too few places.
    """
    references = {prompt.id: prompt.reference for prompt in prompts}
    _check(config, plan, references, scores)
    assert scores is not None
    sampling = LabelSampling(config.temperature, config.label_samples, config.label_form)
    scales = tuple(float(one) for one in plan.manifest.labels["scales"])
    settings = LabelSettings(
        config.metrics, scales, config.label_share, sampling, config.label_reference, config.seed,
        config.new_tokens or ON_POLICY_TOKENS,
    )  # fmt: skip
    labels = SequenceLabels(collector.pair, settings, dict(scores), references)
    collector.sequence = labels
    if not tell and not needs_look(labels, config.label_scales):
        return plan
    found = None if tell or has_corpus_metric(labels) else earlier_look(out, plan)
    if found is not None:
        return _settled(collector, labels, plan, found)
    look = first_look(collector, plan)
    if tell or say:
        tqdm.write(cost(look, plan))
    if not config.label_scales:
        scales = tuple(look.scales(config.metrics))
    own = {"scales": list(scales), "drift": look.drift(), "looked_at": look.prompts}
    return _settled(collector, replace(labels, scores=look.scores), plan, own)


def earlier_look(out: str, plan: CollectionPlan) -> dict[str, Any] | None:
    """The first look that an earlier start of the same collection recorded; None where there was none."""
    folder = open_folder(out)
    if folder.size(HEADER) is None:
        return None
    labels = dict(read_header(folder).labels)
    found = {name: labels.pop(name) for name in LOOKED if name in labels}
    own = {name: value for name, value in plan.manifest.labels.items() if name not in LOOKED}
    return found if len(found) == len(LOOKED) and labels == own else None


def _settled(
    collector: BatchCollector, labels: SequenceLabels, plan: CollectionPlan, found: Mapping[str, Any]
) -> CollectionPlan:
    """The plan with what a first look found; the collector works by it."""
    collector.sequence = labels.with_scales(found["scales"], labels.scores)
    own = {**plan.manifest.labels, **found}
    plan = replace(plan, manifest=replace(plan.manifest, labels=own))
    collector.manifest = plan.manifest
    return plan


def _check(
    config: CollectConfig,
    plan: CollectionPlan,
    references: Mapping[str, str | None],
    scores: Mapping[str, Any] | None,
) -> None:
    absent = [name for name in config.metrics if name not in (scores or {})]
    if absent:
        raise InputError(f"labels='sequence': no scorer for {absent[0]}; pass scores={{{absent[0]!r}: ...}}")
    if config.label_reference == "verifier":
        return
    missing = [prompt.id for prompt in plan.prompts if references.get(prompt.id) is None]
    wanting = [
        name for name in config.metrics if not getattr((scores or {})[name], "without_references", False)
    ]
    if missing and wanting:
        raise InputError(
            f"label_metric {wanting[0]} needs references, and {len(missing)} of {len(plan.prompts)} prompts have none "
            f"(first: {missing[0]}); give --reference-path, or use --label-reference verifier"
        )
