"""``collect``: what the command line and the pipeline call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deferral_train.collecting.batches import BatchCollector
from deferral_train.collecting.config import ON_POLICY_TOKENS, CollectConfig
from deferral_train.collecting.engine import run_engine
from deferral_train.collecting.launch import launch, processes
from deferral_train.collecting.mining import Mined
from deferral_train.collecting.plan import CollectionPlan, make_plan, read_any_prompts, size_text
from deferral_train.collecting.prefixes import make_source
from deferral_train.collecting.progress import check_room
from deferral_train.collecting.sequence_work import PlannedWork, label_sequences
from deferral_train.collecting.served import ServedText, TextEngine, check_served
from deferral_train.errors import InputError
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.load import ModelPair, load_models
from deferral_train.pairs.prompts import Prompt
from deferral_train.provenance import one_writer
from deferral_train.traces import Manifest, open_traces
from deferral_train.traces.folder import Folder, open_folder
from deferral_train.traces.kinds import SEQUENCE_LABELS
from deferral_train.traces.writer import clear_folder, refuse_changes


def collect(
    config: CollectConfig,
    out: str | Path,
    progress: bool = True,
    *,
    models: ModelPair | None = None,
    prompts: Sequence[Prompt] | None = None,
    scores: Mapping[str, Any] | None = None,
    engine: TextEngine | None = None,
    existing: str = "resume",
) -> Manifest:
    """Run both models over prompts and log their token distributions as traces; resumes what is unfinished.

    Args:
        config: what to collect.
        out: trace folder, local or an fsspec address.
        progress: announce, show a bar, and say what was left out.
        models: a pair already in memory, in place of ``config.drafter`` and ``config.verifier``.
        prompts: prompts already read, in place of ``config.prompts``.
        scores: a scorer of each metric in ``config.metrics``, for ``labels="sequence"``
            (:data:`~deferral_train.collecting.sequence.Score`) and ``labels="autojudge"``
            (:data:`~deferral_train.collecting.mining.Quality`); the command looks them up by name.
        engine: a serving engine that holds the verifier, too, and writes its greedy texts and those of sequence labels.
        existing: traces in ``out``: ``resume`` goes on with them and refuses those of other settings or inputs,
            ``replace`` removes these, ``fresh`` removes any.

    Returns:
        The manifest of the finished folder.

    Raises:
        InputError: a pair, prompts or settings that cannot work, a folder collected with other
            settings, a full disk, no position with finite logits.
    """
    out = str(out)
    devices, num_nodes = processes(config.devices, config.num_nodes)
    given, work = _prepare(config, models, prompts, scores, engine)
    plan, collector = work.plan, work.collector
    if config.labels == SEQUENCE_LABELS:
        plan = label_sequences(config, work, given, scores, out, say=progress and _rank() == 0)
    with one_writer(out, "collect") if _rank() == 0 else nullcontext():
        if _rank() == 0:
            _make_way(open_folder(out), plan.manifest, existing)
        # Every process looks for itself, so that none is left waiting for one that gave up.
        if existing == "resume":
            refuse_changes(open_folder(out), plan.manifest)
        check_room(plan, out, config.max_bytes)
        if progress:
            _say_left_out(plan)
        run_engine(
            collector.pair, collector, plan, out,
            devices=devices, num_nodes=num_nodes, max_bytes=config.max_bytes, progress=progress,
        )  # fmt: skip
        if collector.sequence is not None:
            collector.sequence.unscored.check()
        if _rank() == 0:
            _report(out, progress)
    return plan.manifest


def tell_plan(
    config: CollectConfig,
    *,
    models: ModelPair | None = None,
    prompts: Sequence[Prompt] | None = None,
    scores: Mapping[str, Any] | None = None,
    engine: TextEngine | None = None,
) -> None:
    """Say how many places sequence labels would be made of, how many tokens they take and how long; write nothing.

    Args: as :func:`collect`.
    """
    given, work = _prepare(config, models, prompts, scores, engine)
    label_sequences(config, work, given, scores, tell=True)


def _prepare(
    config: CollectConfig,
    models: ModelPair | None,
    prompts: Sequence[Prompt] | None,
    scores: Mapping[str, Any] | None,
    engine: TextEngine | None,
) -> tuple[list[Prompt], PlannedWork]:
    """The prompts as read, and the planned work with what does it."""
    if engine is not None:
        check_served(config)
    if config.rule is not None:
        # A mistyped rule is refused before any model is loaded.
        rule_from_spec(config.rule, typed=[config.rule])
    metric = config.metrics[0]
    if config.labels == "autojudge" and metric not in (scores or {}):
        raise InputError(f"labels='autojudge': no scorer for {metric}; pass scores={{{metric!r}: ...}}")
    pair, teacher = _models(config, models)
    given = list(prompts) if prompts is not None else read_any_prompts(config)
    facts = None if engine is None else engine.facts
    plan = make_plan(
        config, pair, given[: config.limit], teacher, handed_over=models is not None, engine=facts
    )
    source = make_source(config)
    if config.labels == "autojudge" and scores is not None:
        source = Mined(config.new_tokens or ON_POLICY_TOKENS, scores[metric], config.label_tolerance)
    if engine is not None and config.prefixes == "verifier" and config.temperature == 0:
        source = ServedText(engine, config.new_tokens or ON_POLICY_TOKENS)
    third = teacher.verifier if teacher else None
    return given, PlannedWork(plan, BatchCollector(pair, third, source, plan.manifest, plan.prompts), engine)


def _make_way(folder: Folder, manifest: Manifest, existing: str) -> None:
    """Remove traces that are not to be gone on with; nothing but a trace folder's own files is touched."""
    if existing not in ("resume", "replace", "fresh"):
        raise InputError(f"existing={existing!r}: use resume, replace or fresh")
    if existing == "replace":
        try:
            refuse_changes(folder, manifest)
            return
        except InputError as error:
            tqdm.write(f"collect: {error.args[0].partition('; use')[0]}; collected anew")
    if existing != "resume":
        clear_folder(folder)


def _models(config: CollectConfig, models: ModelPair | None) -> tuple[ModelPair, ModelPair | None]:
    if models is None and not (config.drafter and config.verifier):
        raise InputError("drafter, verifier: name both checkpoints")
    device = config.device if config.device_map else _device(config.device)
    pair = models or load_models(
        config.drafter,
        config.verifier,
        device,
        config.dtype,
        drafter_device=config.drafter_device,
        device_map=config.device_map,
    )
    if config.teacher is None:
        return pair, None
    # Loaded beside the drafter, so that its tokenizer is checked against the pair's.
    other = load_models(config.drafter or config.teacher, config.teacher, str(pair.device), config.dtype)
    if other.is_encoder_decoder != pair.is_encoder_decoder or other.vocab_size < pair.vocab_size:
        raise InputError(f"teacher={config.teacher}: its vocabulary or kind does not fit the pair")
    return pair, other


def _device(device: str) -> str:
    """Each process of a node its own GPU."""
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        launched = launch()
        return f"cuda:{launched.local_rank if launched else os.environ.get('LOCAL_RANK', '0')}"
    return device


def _rank() -> int:
    launched = launch()
    return launched.rank if launched else int(os.environ.get("LOCAL_RANK", "0"))  # Lightning's own processes


def _say_left_out(plan: CollectionPlan) -> None:
    if _rank() != 0:
        return
    for word, verb in (("skipped", "left out"), ("cut", "cut short")):
        notices: Any = plan.manifest.prompts[word]
        if notices:
            name, reason = notices[0]
            given = plan.manifest.prompts["given"]
            tqdm.write(f"collect: {len(notices)} of {given} prompts {verb}; first: {name}: {reason}")


def _report(out: str, progress: bool) -> None:
    traces = open_traces(out, partial=True)
    if traces.nonfinite and not len(traces):
        raise InputError(
            f"logits: all {traces.nonfinite} positions are NaN or infinite, {out} holds no token; "
            "check the pair's weights and dtype (float16 overflows where bfloat16 does not)"
        )
    if not progress:
        return
    tqdm.write(f"collect: {len(traces):,} tokens, {size_text(traces.bytes)} in {out}")
    if not traces.complete:
        count = len(traces.manifest.chunks)
        tqdm.write(
            f"collect: stopped at max_bytes with {count - len(traces.records)} of {count} shards not collected; "
            "run again with a larger limit to go on"
        )
    if traces.nonfinite:
        record = next(record for record in traces.records if record.nonfinite)
        prompt, position, model = record.nonfinite_at[0]
        tqdm.write(
            f"collect: {traces.nonfinite} positions left out for NaN or infinite logits; first: prompt "
            f"{traces.manifest.prompt_ids[prompt]}, position {position}, {model}"
        )
