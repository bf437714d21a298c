"""The outside of a run: files, folders and models that its stages read; and its values, checked before any work.

What lies here decides whether a finished stage may be taken up, see :mod:`deferral_train.pipeline.stages`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deferral_train import provenance
from deferral_train.collecting.config import CollectConfig
from deferral_train.decoding.decode import DecodeConfig
from deferral_train.decoding.pair import Settings
from deferral_train.decoding.settings import VLLM
from deferral_train.errors import InputError
from deferral_train.evaluation.quality import check_metric
from deferral_train.heads.rules import HEAD_PARAMETERS, parse_spec, rule_from_spec
from deferral_train.pairs.checkpoint import find_checkpoint
from deferral_train.pairs.load import DTYPES
from deferral_train.pipeline.config import PARTS, PairSection, RunConfig, TextConfig
from deferral_train.pipeline.decoder import engine_facts
from deferral_train.pipeline.heads import candidate_config
from deferral_train.redaction import redacted_text
from deferral_train.serving.checks import check_served
from deferral_train.serving.running import EngineSettings

FREE_METRICS = ("bleu", "chrf", "exact_match", "log_likelihood")


def text_inputs(config: TextConfig) -> dict[str, str | None]:
    """Prompt files by part; of the standard library the interpreter's version is what counts."""
    if config.stdlib:
        return {f"python {platform.python_version()}": platform.python_version()}
    found: dict[str, str | None] = {}
    for part in PARTS:
        source = getattr(config, part)
        found |= {f"text.{part}.path": source.path, f"text.{part}.reference_path": source.reference_path}
    return found


def pair_inputs(config: PairSection) -> dict[str, str | None]:
    """The models, or the texts that they are trained on."""
    if config.train is None:
        named = {"drafter": config.drafter, "verifier": config.verifier}
        found: dict[str, str | None] = {f"pair.{role}": name for role, name in named.items()}
        for role, name in named.items():
            base = find_checkpoint(name, role).folder if Path(name).expanduser().exists() else None
            if base is not None and base != Path(name).expanduser():  # of an adapter
                found[f"pair.{role}.base"] = str(base)
        return found
    text = config.train.text
    named = {
        "files": text.files,
        "targets": text.targets,
        "heldout": text.heldout,
        "heldout_targets": text.heldout_targets,
    }
    found = {
        f"pair.train.text.{name}.{place}": file
        for name, files in named.items()
        for place, file in enumerate(files)
    }
    if config.train.from_verifier is not None:
        found["pair.train.from_verifier"] = config.train.from_verifier
    return found | {f"python {platform.python_version()}": platform.python_version()}


def spec_inputs(specs: Sequence[str]) -> dict[str, str | None]:
    """Folders of heads and files of tables that rules name."""
    found: dict[str, str | None] = {}
    for spec in specs:
        name, parameters = parse_spec(spec)
        if name in HEAD_PARAMETERS and "head" in parameters:
            found[spec] = str(parameters["head"])
        elif name == "csd" and "table" in parameters:
            found[spec] = str(parameters["table"])
        if spec.partition(":")[0].count("."):  # my_pkg.mine:MyRule
            found |= metric_inputs([spec])
    return found


def metric_inputs(metrics: Sequence[str | None]) -> dict[str, str | None]:
    """Programs, databases and modules that metrics name."""
    given = [metric for metric in metrics if metric is not None]
    return {
        f"{redacted_text(metric)}, file {place}": file
        for metric in given
        for place, file in enumerate(provenance.files_of_metric(metric))
    }


def head_inputs(config: RunConfig) -> dict[str, str | None]:
    """Checkpoints that candidates read embeddings from, and what the metrics of rounds name."""
    found: dict[str, str | None] = {}
    for name, settings in config.heads.candidates.items():
        verifier = settings.get("verifier") if isinstance(settings, Mapping) else None
        if isinstance(verifier, str):
            found[f"heads.candidates.{name}.verifier"] = verifier
    return found | (metric_inputs(config.heads.label_metric) if config.heads.rounds else {})


def check_values(config: RunConfig) -> None:
    """Refuse values that a later stage would stumble over, hours from now.

    Raises:
        InputError: field, value and remedy in one line.
    """
    if config.seed < 0 or config.bootstrap < 0:
        raise InputError(f"seed={config.seed}, bootstrap={config.bootstrap}: give whole numbers >= 0")
    if config.on_policy is not None and config.on_policy < 1:
        raise InputError(f"on_policy={config.on_policy}: give at least 1, or leave it out")
    engine_facts(config.engine)
    for part in () if config.text.stdlib else PARTS:
        _check_part(part, getattr(config.text, part))
    if config.pair.dtype not in ("auto", *DTYPES):
        raise InputError(f"pair.dtype={config.pair.dtype!r}: use auto, {', '.join(DTYPES)}")
    with _Section("traces"):
        traces = asdict(config.traces)
        if traces["prefixes"] == "cascade":
            raise InputError("prefixes='cascade': a run logs its own cascade in stage skew; use reference")
        CollectConfig(seed=config.seed, **traces)
    for name, settings in config.heads.candidates.items():
        candidate_config(name, settings, config.seed)
    typed = [*config.rules, *config.decoded]
    for spec in typed:
        with _Section("rules"):
            rule_from_spec(spec, typed)
    _check_decoding(config)
    if config.engine == VLLM:
        _check_engine(config)


def _check_engine(config: RunConfig) -> None:
    """Refuse what a run's engine cannot do and the loop can."""
    for name in ("drafter_device", "device_map"):
        value = getattr(config.pair, name)
        if value is not None:
            raise InputError(
                f"pair.{name}={value!r} with engine vllm: it places both models itself; leave it out"
            )
    cascades = (*config.frontier.token_cascades, *config.frontier.sequence_cascades)
    if config.frontier.temperatures and cascades:
        raise InputError(
            f"frontier: cascade {cascades[0]} with engine vllm: it drafts and verifies blocks alone; leave it out, or "
            "use engine transformers"
        )
    drafts = EngineSettings("", num_draft_tokens=config.decode.num_draft_tokens).speculation("drafter")
    typed = [*config.rules, *(config.frontier.rules if config.frontier.temperatures else ())]
    for spec in typed:
        with _Section("rules"):
            check_served(rule_from_spec(spec, typed), SimpleNamespace(**drafts))


class _Section:
    """Within, an InputError says which section of the config it is about."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, InputError) and not str(error).startswith(f"{self.name}."):
            raise InputError(f"{self.name}: {error}") from None


def _check_part(part: str, source: Any) -> None:
    if "{prompt}" not in source.template:
        raise InputError(f"text.{part}.template={source.template!r} has no {{prompt}} in it; write one")
    if source.start < 0 or (source.limit is not None and source.limit < 1):
        raise InputError(
            f"text.{part}: start={source.start}, limit={source.limit}; give start >= 0, limit >= 1"
        )
    if source.reference_path and not Path(source.reference_path).expanduser().is_file():
        raise InputError(f"text.{part}.reference_path={source.reference_path} does not exist; check the path")


def _check_decoding(config: RunConfig) -> None:
    section = config.decode
    with _Section("decode"):
        if section.limit < 1 or (section.timed is not None and section.timed < 1):
            raise InputError(f"limit={section.limit}, timed={section.timed}: give at least 1")
        DecodeConfig(section.settings(config.seed), section.repetitions, log_tokens=5)
        for metric in section.metrics:
            if metric not in FREE_METRICS:
                check_metric(metric)
    with _Section("point"):
        if config.point.metric is not None:
            check_metric(config.point.metric)
    frontier = config.frontier
    with _Section("frontier"):
        for name in ("limit", "batch_size", "timed", "repetitions"):
            if getattr(frontier, name) < 1:
                raise InputError(f"{name}={getattr(frontier, name)}: give at least 1")
        for temperature in frontier.temperatures:
            Settings(temperature=temperature)
        if frontier.temperatures:
            if frontier.metric not in FREE_METRICS:
                check_metric(frontier.metric)
            for spec in frontier.rules:
                rule_from_spec(spec, typed=frontier.rules)
            for spec in (*frontier.token_cascades, *frontier.sequence_cascades):
                rule_from_spec(spec, typed=[spec])
