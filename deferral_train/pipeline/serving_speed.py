"""The stage that measures served tokens a second: no speculation, lossless and the chosen rule, 1, 8 and 32 at once.

The engine is handed all prompts and runs so many of them at a time. Ratios are taken within a repetition, in which the
rules follow each other.
"""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train import provenance
from deferral_train.decoding.outputs import BATCHES, OUTPUTS, read_lines
from deferral_train.decoding.settings import DecodeConfig
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pipeline.context import RunContext
from deferral_train.pipeline.text import read_part

FOLDER, FILE = "served", "served.json"
AT_ONCE = (1, 8, 32)
TIMES, MOST = 16, 128  # prompts: so many times those that run at once, and no more
ALONE, LOSSLESS = "verifier_only", "lossless"


def measure_served(run: RunContext, results: Mapping[str, Any]) -> dict[str, Any]:
    """Decode test prompts at every load and write ``served.json``.

    Returns:
        ``label`` of the chosen rule, ``ran`` (engine, runner, device, number format), ``machine``, ``repetitions``,
        ``max_new_tokens``, ``num_draft_tokens``, ``temperature``, and ``loads``: for each ``at_once`` and ``prompts``,
        ``tokens_per_second`` of every rule and, of the chosen one, ``against`` no speculation and lossless: each
        ``value``, the median over repetitions, with ``lowest`` and ``highest``.
    """
    section, chosen = run.config.decode, run.chosen(results)
    rules = {name: rule_from_spec(name) for name in (ALONE, LOSSLESS)}
    rules[chosen["label"]] = rule_from_spec(chosen["spec"], run.config.rules)
    decoder = run.decoder(results["pair"])
    prompts = read_part(run.folder, "test", section.limit)
    loads, ran = [], {}
    for at_once in AT_ONCE:
        some = prompts[: min(TIMES * at_once, MOST)]
        asked = DecodeConfig(
            replace(section.settings(run.config.seed), batch_size=at_once), section.repetitions
        )
        out = run.folder / FOLDER / f"at-{at_once}"
        summary = decoder.decode(some, rules, asked, out)
        ran = summary["rules"][chosen["label"]]["ran"]
        loads.append({"at_once": at_once, "prompts": len(some), **_speeds(out, chosen["label"])})
    found = {
        "label": chosen["label"],
        "ran": {name: ran[name] for name in ("engine", "runner", "device", "dtype")},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "repetitions": section.repetitions,
        "max_new_tokens": section.max_new_tokens,
        "num_draft_tokens": section.num_draft_tokens,
        "temperature": section.temperature,
        "loads": loads,
    }
    provenance.write_json(run.folder / FILE, found)
    return found


def _speeds(folder: Path, label: str) -> dict[str, Any]:
    """Tokens a second of every rule in a folder, and the ratios of one to the others, by repetition."""
    tokens: dict[tuple[str, int], int] = defaultdict(int)
    seconds: dict[tuple[str, int], float] = defaultdict(float)
    for row in read_lines(folder / OUTPUTS):
        tokens[row["rule"], row["repetition"]] += row["counts"]["emitted"]
    for batch in read_lines(folder / BATCHES):
        seconds[batch["rule"], batch["repetition"]] += batch["seconds"]
    speed: dict[str, list[float]] = defaultdict(list)
    for (rule, repetition), count in sorted(tokens.items()):
        speed[rule].append(count / seconds[rule, repetition])
    against = {
        name: _spread(np.divide(speed[label], own))
        for name, own in speed.items()
        if name in (ALONE, LOSSLESS)
    }
    return {"tokens_per_second": {rule: _spread(own) for rule, own in speed.items()}, "against": against}


def _spread(values: Iterable[float]) -> dict[str, float]:
    known = list(map(float, values))
    return {"value": float(np.median(known)), "lowest": min(known), "highest": max(known)}


def sentence(served: Mapping[str, Any]) -> str:
    """The measurement in words: ratios at every load, and what they were measured on."""
    alone, lossless = (
        _list([load["against"][name]["value"] for load in served["loads"]]) for name in (ALONE, LOSSLESS)
    )
    loads = _words([str(load["at_once"]) for load in served["loads"]])
    ran = served["ran"]
    return (
        f"served tokens/s at {loads} requests at once: {alone} of no speculation, {lossless} of lossless "
        f"({ran['engine']}, {ran['runner']} runner, {ran['device']}, {ran['dtype']})"
    )


def conditions(served: Mapping[str, Any]) -> str:
    """The measurement behind served speeds in a sentence: repetitions, prompts, settings, engine and machine."""
    ran = served["ran"]
    prompts = _words([str(load["prompts"]) for load in served["loads"]])
    return (
        f"Served speeds are medians of {served['repetitions']} repetition(s) on {prompts} test prompts, blocks of "
        f"{served['num_draft_tokens']}, at most {served['max_new_tokens']} tokens, temperature "
        f"{served['temperature']:g}, {ran['dtype']}, {ran['engine']} with its {ran['runner']} runner on "
        f"{ran['device']} ({served['machine']}); other work on the machine moves them."
    )


def pays_at(served: Mapping[str, Any]) -> list[int]:
    """Loads at which the chosen rule serves more tokens a second than no speculation and than lossless."""
    return [
        load["at_once"]
        for load in served["loads"]
        if all(load["against"][name]["value"] > 1 for name in (ALONE, LOSSLESS))
    ]


def _list(values: Sequence[float]) -> str:
    return _words([f"{value:.2f}x" for value in values])


def _words(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"
