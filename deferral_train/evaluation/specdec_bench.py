"""The results of ``decode`` as the field's benchmark writes them, a folder for each rule.

The files and names are those of specdec_bench (NVIDIA Model-Optimizer, as read in 2026-11): ``configuration.json`` (its
flags, and under ``deferral_train`` what it has no flag for), ``timing.json``, ``acceptance_rate.json`` and
``speculation_profile.json``, schema 1.0. What ``decode`` does not measure, such as the time of a first token, is left
out rather than filled in. Not written by their code and not read by it here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train import provenance
from deferral_train.decoding.outputs import BATCHES, OUTPUTS, read_lines
from deferral_train.evaluation.acceptance import acceptance_by_length, acceptance_by_place, block_lengths
from deferral_train.redaction import redacted, redacted_text

FOLDER = "specdec_bench"
# Labels that draft nothing, and those whose verification has a name of its own.
ALONE = ("verifier_only", "vllm:no_speculation")
METHODS = {"lossless": "longest_prefix", "vllm:lossless": "longest_prefix", "vllm:block": "block"}
SCHEMA = "1.0"
TOLERANCE = 0.02  # of the mean length against the one that the places imply
_UNFIT = re.compile(r"[^A-Za-z0-9._=-]+")


def write_specdec_bench(folder: str | Path, summary: Mapping[str, Any], drafter: str, verifier: str) -> Path:
    """Write ``specdec_bench/RULE/*.json`` into a finished decode folder; returns ``specdec_bench``.

    Args:
        summary: content of its summary.json.
        drafter, verifier: names as they were given.
    """
    root = Path(folder)
    rows, batches = defaultdict(list), defaultdict(list)
    for row in read_lines(root / OUTPUTS):
        rows[row["rule"]].append(row)
    for batch in read_lines(root / BATCHES):
        batches[batch["rule"]].append(batch)
    # A profile goes out with a checkpoint: of a folder's path only what names it.
    short = ["/".join(Path(redacted_text(name)).parts[-2:]) for name in (verifier, drafter)]
    names = dict(zip(("model_dir", "draft_model_dir"), short))
    for number, (label, rule) in enumerate(summary["rules"].items()):
        out = root / FOLDER / f"{number:02d}-{_UNFIT.sub('_', redacted_text(label))[:80]}"
        files = {
            "configuration": _configuration(label, rule, summary, names),
            "timing": [_timing(rows[label], batches[label], rule)],
            "acceptance_rate": [_acceptance(rows[label])],
            "speculation_profile": _profile(label, rule, summary, names),
        }
        for name, content in files.items():
            if content not in (None, [None]):
                provenance.write_json(out / f"{name}.json", content)
    return root / FOLDER


def _configuration(
    label: str, rule: Mapping[str, Any], summary: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    settings = summary["settings"]
    return {
        **names,
        "tokenizer": names["model_dir"],
        "engine": (rule.get("ran") or {}).get("engine", "deferral_train"),
        "speculative_algorithm": "NONE" if label in ALONE else "DRAFT_TARGET",
        "draft_length": settings["num_draft_tokens"],
        "output_length": settings["max_new_tokens"],
        "num_requests": rule["prompts"],
        "concurrency": settings["batch_size"],
        "tp_size": 1,
        "runtime_params": {
            "sampling_kwargs": {name: settings[name] for name in ("temperature", "top_p", "top_k")}
        },
        "deferral_train": {
            "rule": redacted_text(label),
            "dial": rule["dial"],
            "quality": rule["quality"],
            "turns": "first",
            "settings": settings,
            "conditions": summary.get("conditions"),
            "provenance": redacted(summary["provenance"]),
        },
    }


def _timing(
    rows: Sequence[Mapping[str, Any]], batches: Sequence[Mapping[str, Any]], rule: Mapping[str, Any]
) -> dict[str, Any]:
    """Times of requests only where they were decoded one by one: in a batch a row waits for the others."""
    found: dict[str, Any] = {
        "Output TPS": rule["tokens_per_second"],
        "Output TPS/gpu": rule["tokens_per_second"],
        "Number of Output Tokens": _statistics([row["counts"]["emitted"] for row in rows]),
    }
    if all(batch["rows"] == 1 for batch in batches):
        found["E2E Request Time"] = _statistics([batch["seconds"] for batch in batches])
    return found


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    """As text with four places, which is how the benchmark writes them."""
    data = np.asarray(values, dtype=np.float64)
    found: dict[str, Any] = {name: f"{getattr(data, name)():.4f}" for name in ("min", "max", "mean", "std")}
    quantiles = {str(share): f"{np.quantile(data, share):.4f}" for share in (0.25, 0.5, 0.75)}
    return {**found, "quantiles": quantiles}


def _acceptance(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """None where texts were not verified block by block (a drafter alone, lazy execution)."""
    requests: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        lengths = block_lengths(row)
        if lengths is None:
            return None
        requests[row["id"]] += lengths
    means = {name: float(np.mean(lengths)) for name, lengths in requests.items() if lengths}
    if not means:
        return None
    categories: dict[str, list[float]] = defaultdict(list)
    for name, mean in means.items():
        categories[name.rpartition("/")[0] or "all"].append(mean)
    histogram, conditional, joint = acceptance_by_length(one for every in requests.values() for one in every)
    return {
        "Request_AL": means,
        "Category_AL": {name: float(np.mean(values)) for name, values in sorted(categories.items())},
        "Average_AL": float(np.mean(list(means.values()))),
        "Acceptance_Length_Histogram": histogram,
        "Conditional_Acceptance_Rate": conditional,
        "Joint_Acceptance_Rate": joint,
    }


def _profile(
    label: str, rule: Mapping[str, Any], summary: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any] | None:
    """Acceptance by place, for servers and planners; None where nothing was drafted and verified."""
    places = acceptance_by_place(rule["positions"])
    length, settings = rule["mean_acceptance_length"], summary["settings"]
    if not places["conditional"] or length is None or label in ALONE:
        return None
    implied = 1 + sum(places["marginal"])
    missing = [0.0] * (settings["num_draft_tokens"] - len(places["conditional"]))
    return {
        "schema_version": SCHEMA,
        "measured": True,
        "method": "draft_model",
        "draft_checkpoint": {"id": names["draft_model_dir"]},
        "target_model": {"id": names["model_dir"]},
        "num_speculative_tokens": settings["num_draft_tokens"],
        "block_size": None,
        "max_supported_k": None,
        "verification_method": METHODS.get(label, f"lossy: {redacted_text(label)}"),
        "conditional_accept_rates": [round(rate, 6) for rate in places["conditional"] + missing],
        "marginal_accept_rates": [round(rate, 6) for rate in places["marginal"] + missing],
        "mean_accept_length": round(length, 6),
        "accept_length_model": "chain_analytic",
        "accept_length_by_k": {str(settings["num_draft_tokens"]): round(length, 6)},
        "measurement_conditions": {
            "temperature": settings["temperature"],
            "requests": rule["prompts"],
            "tokens": rule["counts"]["emitted"],
            "concurrency": settings["batch_size"],
            **(summary.get("conditions") or {}),
        },
        "validation": {
            "mean_consistency": {
                "implied_mean_accept_length": round(implied, 6),
                "reported_mean_accept_length": round(length, 6),
                "abs_delta": round(abs(implied - length), 6),
                "tolerance": TOLERANCE,
                "passed": abs(implied - length) <= TOLERANCE,
            }
        },
    }
