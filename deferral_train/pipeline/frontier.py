"""The frontier stage: every rule over its dial, decoded at several temperatures; the paper's figures and Table 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deferral_train.decoding.outputs import BATCHES, read_lines
from deferral_train.decoding.settings import DecodeConfig
from deferral_train.evaluation.figures import draw_frontier
from deferral_train.evaluation.frontier import VERIFIER, frontier_of, write_frontier
from deferral_train.evaluation.outputs import check_metrics, score_outputs
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.prompts import Prompt
from deferral_train.pipeline import operating_point
from deferral_train.pipeline.config import DecodeSection, FrontierConfig
from deferral_train.pipeline.decoder import StageDecoder
from deferral_train.rules.base import Rule
from deferral_train.traces import Traces

FOLDER = "frontier"
ALWAYS = ("bleu", "chrf", "exact_match")  # in every summary of decode that has references
ENDS = (VERIFIER, "lossless", "drafter_only")


def decode_frontier(
    config: FrontierConfig,
    section: DecodeSection,
    decoder: StageDecoder,
    prompts: Sequence[Prompt],
    traces: Traces,
    rules: Mapping[str, tuple[str, Rule | str]],
    run: Path,
    seed: int,
) -> dict[str, Any]:
    """Decode the settings and write ``evaluation/frontier.json`` with its figures; returns Table 2 by temperature.

    Args:
        section: block size and limit of tokens, as in the run's own decoding.
        prompts: of the test part. traces: of the calibration part, where dials are set.
        rules: name to (spec without a dial value, the rule to sweep).
    """
    metrics = () if config.metric in ALWAYS else (config.metric,)
    check_metrics(metrics, prompts)
    entries = []
    for temperature in config.temperatures:
        sweeps = {name: rule for name, (_, rule) in rules.items()}
        dials = operating_point.spread(traces, sweeps, config.shares, temperature, section.num_draft_tokens)
        tried = {
            "speculative": {name: rule_from_spec(name) for name in ENDS}
            | operating_point.labelled(rules, dials),
            "token": {
                f"token cascade {spec}": rule_from_spec(spec, typed=[spec]) for spec in config.token_cascades
            },
            "sequence": {
                f"sequence cascade {spec}": rule_from_spec(spec, typed=[spec])
                for spec in config.sequence_cascades
            },
        }
        # The head was fitted at the temperature of the traces; here it is tried at others, on purpose.
        settings = replace(
            section.settings(seed),
            batch_size=config.batch_size,
            temperature=temperature,
            accept_mismatch=True,
        )
        folder = run / FOLDER / f"t{temperature:g}"
        judged = _decode_all(decoder, prompts, tried, DecodeConfig(settings), folder / "quality", metrics)
        timing = DecodeConfig(replace(settings, batch_size=1), config.repetitions)
        timed = _decode_all(decoder, prompts[: config.timed], tried, timing, folder / "timing")
        entry = frontier_of(_with_times(judged.summary, timed.summary), config.metric, timed.batches)
        entries.append({**entry, "batch_size": 1, "timed_prompts": min(config.timed, len(prompts))})
    write_frontier(entries, run / "evaluation")
    for entry in entries:
        draw_frontier(entry, run / "evaluation" / "frontier")
    return {f"{entry['temperature']:g}": entry["table2"] for entry in entries}


@dataclass(frozen=True)
class _Decoded:
    """Summaries of all executions as one, and their batches."""

    summary: dict[str, Any]
    batches: list[dict[str, Any]]


def _decode_all(
    decoder: StageDecoder,
    prompts: Sequence[Prompt],
    tried: Mapping[str, Mapping[str, Rule]],
    config: DecodeConfig,
    folder: Path,
    metrics: Sequence[str] = (),
) -> _Decoded:
    """Decode the rules of every execution, each in a folder of its own, and score the outputs."""
    summary: dict[str, Any] = {}
    batches: list[dict[str, Any]] = []
    for execution, named in tried.items():
        if named:
            options = replace(config, settings=replace(config.settings, execution=execution))
            found = decoder.decode(prompts, named, options, folder / execution)
            if metrics:
                found = score_outputs(folder / execution, metrics, decoder.scoring(metrics), prompts)
            summary = {**found, "rules": {**summary.get("rules", {}), **found["rules"]}}
            batches += list(read_lines(folder / execution / BATCHES))
    return _Decoded(summary, batches)


def _with_times(summary: Mapping[str, Any], timed: Mapping[str, Any]) -> dict[str, Any]:
    """Quality, rates and calls of one summary, seconds of the other."""
    rules = {
        label: {**rule, "seconds": timed["rules"][label]["seconds"]}
        for label, rule in summary["rules"].items()
    }
    return {**summary, "rules": rules, "repetitions": timed["repetitions"]}
