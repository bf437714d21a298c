"""Drafter size, drafting plan and lenience against speed and quality, from folders of ``decode``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train.decoding.outputs import BATCHES, OUTPUTS, read_lines, read_record
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import Interval, Redraws
from deferral_train.evaluation.breakdowns.prompts import size_words
from deferral_train.evaluation.breakdowns.tables import Row
from deferral_train.evaluation.online import speed_table
from deferral_train.evaluation.quality import per_prompt

METRIC = "chrf"


def check_folders(folders: Sequence[Path]) -> None:
    """Refuse what is no finished ``decode``.

    Raises:
        InputError: the folder, named.
    """
    for folder in folders:
        for file in ("summary.json", OUTPUTS):
            if not (folder / file).is_file():
                raise InputError(
                    f"decoded: {folder} holds no {file}; give the --out of a finished decode run"
                )


def settings_table(folders: Sequence[Path], redraws: Redraws) -> list[Row]:
    """A row per folder and rule; groups say what drafts: parameters, K, lenience, draft tokens, stop.

    Times are of the machine and the day of each folder. Speed is against ``verifier_only`` of the same folder, and is
    left out where it was not decoded.
    """
    check_folders(folders)
    return [row for folder in folders for row in _rows(folder, redraws)]


def _rows(folder: Path, redraws: Redraws) -> list[Row]:
    summary = read_record(folder / "summary.json")
    if summary is None or not isinstance(summary.get("rules"), dict):
        raise InputError(
            f"decoded: {folder} holds no summary of rules; give the --out of a finished decode run"
        )
    outputs, batches = list(read_lines(folder / OUTPUTS)), list(read_lines(folder / BATCHES))
    speeds = speed_table(batches)
    group = f"{folder.name}: {describe(summary)}"
    return [
        _row(group, label, rule, [row for row in outputs if row["rule"] == label], speeds.get(label), redraws)
        for label, rule in summary["rules"].items()
    ]


def _row(
    group: str,
    label: str,
    rule: Mapping[str, Any],
    outputs: Sequence[Mapping[str, Any]],
    speed: Interval | None,
    redraws: Redraws,
) -> Row:
    emitted, calls = (_per_prompt(outputs, name) for name in ("emitted", "verifier_calls"))
    numbers: dict[str, Interval | None] = {"tokens per verifier call": redraws.ratio(emitted, calls)}
    # All drafters of a cascade together.
    numbers["drafter passes per token"] = redraws.ratio(_per_prompt(outputs, "drafter_calls"), emitted)
    numbers["ms per token"] = None if rule.get("ms_per_token") is None else Interval(rule["ms_per_token"])
    numbers["speed against the verifier alone"] = speed
    first = [row for row in outputs if row["repetition"] == 0 and row.get("reference") is not None]
    if first:
        scores = per_prompt(METRIC, [row["text"] for row in first], [row["reference"] for row in first])
        numbers[METRIC] = redraws.ratio(np.asarray(scores, dtype=np.float64), np.ones(len(first)))
    found = {name: number for name, number in numbers.items() if number is not None}
    return Row(group, label, len(emitted), float(emitted.sum()), found)


def _per_prompt(outputs: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Counts of each prompt, repetitions added up."""
    totals: dict[str, float] = {}
    for row in outputs:
        totals[str(row["id"])] = totals.get(str(row["id"]), 0.0) + row["counts"][name]
    return np.array(list(totals.values()))


def describe(summary: Mapping[str, Any]) -> str:
    """The drafting settings in words: ``380k, K 4 0 / 0 10, lenience 2``."""
    settings = summary.get("settings", {})
    size = ((summary.get("models") or {}).get("drafter") or {}).get("parameters")
    words = [size_words(size)] if size else []
    plan = settings.get("drafting")
    if plan:
        rows = " / ".join(" ".join(map(str, row)) for row in plan["k"])
        words += [f"K {rows}", f"lenience {plan['lenience']:g}"]
    else:
        words.append(f"{settings.get('num_draft_tokens')} tokens")
    if settings.get("stop") not in (None, "None"):
        words.append(str(settings["stop"]))
    return ", ".join(words)
