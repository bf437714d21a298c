"""Sequence labels: how many are enough. Heads fitted on 1k, 3k, 10k and all labels, decoded at 0.70 of the calls.

    python -m benchmarks.studies.label_curve --pair en-fr --rounds runs/rounds-fr --limit 300 [--out FILE]

Needs a folder of ``deferral-train rounds``. Labels are taken by whole prompts, and one ridge is fitted as ``rounds``
does it. Decoded on the first lines of ``val`` at alphas around the wished calls; numbers are linear between neighbours,
intervals paired with the head of all labels over 1,000 redraws of prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import keep, study_flags
from benchmarks.greedy_tree import decode_tree
from benchmarks.sequence_labels import (
    LOSSLESS,
    SCORES,
    at_calls,
    counts_of,
    finite,
    prompt_weights,
    prompts_of,
    redrawn,
)
from deferral_train import provenance
from deferral_train.decoding.pair import load_pair
from deferral_train.evaluation.sequence import quantiles_of_estimates
from deferral_train.heads.rules import learned_rule
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule
from deferral_train.traces import Traces, open_traces
from deferral_train.traces.sequence import labelled_rows
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit

SIZES = (1_000, 3_000, 10_000, None)
KEPT = (0.35, 0.5, 0.65)


def first_labels(traces: Traces, count: int | None) -> Traces:
    """The first prompts of traces that hold about ``count`` labels; all where None."""
    if count is None:
        return traces
    per_prompt = np.bincount(traces.prompt_of_row, weights=labelled_rows(traces).numpy().astype(float))
    prompts = int(np.searchsorted(np.cumsum(per_prompt), count)) + 1
    ids = traces.manifest.prompt_ids
    chosen = set(ids[:prompts])
    return traces.select_prompts([name for name in traces.prompt_ids if name in chosen])


def compared(own: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """A score, its difference to that of all labels and the interval over redraws; both [B], the first as it is."""
    low, high = np.nanquantile((own - whole)[1:], [0.025, 0.975])
    return {"value": own[0], "less_all": own[0] - whole[0], "low": low, "high": high}


def main() -> int:
    parser = study_flags(__doc__, "runs/label-curve")
    parser.add_argument("--pair", default="en-fr", choices=("en-fr", "en-de"))
    parser.add_argument("--rounds", type=Path, required=True, help="folder of deferral-train rounds")
    parser.add_argument("--limit", type=int, default=300, help="validation prompts")
    parser.add_argument("--calls", type=float, default=0.7)
    options = parser.parse_args()
    models = options.shared / "models" / f"multi30k-{options.pair}"
    pair = load_pair(str(models / "drafter"), str(models / "verifier"), options.device)
    matrix = pair.models.verifier.get_output_embeddings().weight.detach().float().cpu()
    traces = open_traces(options.rounds / "traces" / "round-0")
    groups: dict[str, dict[str, Rule]] = {}
    for size in SIZES:
        part = first_labels(traces, size)
        count = int(labelled_rows(part).sum())
        config = FitConfig(train=[part], truth="sequence", body="linear", objective="ridge", verifier=matrix)
        head = fit(config, options.work / f"{options.pair}-{count}").head
        groups[f"{count:,}"] = {
            f"{count}:{alpha:g}": learned_rule(head, alpha)
            for alpha in quantiles_of_estimates(traces, head, KEPT)
        }
    every = {LOSSLESS: make_rule(LOSSLESS)} | {
        k: rule for rules in groups.values() for k, rule in rules.items()
    }
    prompts = prompts_of(options.shared, options.pair, "val", options.limit)
    lines: dict[str, list[dict[str, Any]]] = {label: [] for label in every}
    for row in decode_tree(pair, prompts, every):
        lines[row.rule].append(row.as_line())
    weights = prompt_weights(len(prompts))
    cache: dict[tuple[str, str], Any] = {}
    known = {label: redrawn(counts_of(rows, cache), weights) for label, rows in lines.items()}
    calls = options.calls * known[LOSSLESS]["calls"]
    at = {
        name: {
            score: at_calls([known[label] for label in rules], score, calls) for score in (*SCORES, "words")
        }
        for name, rules in groups.items()
    }
    whole, words = list(at.values())[-1], known[LOSSLESS]["words"][0]
    found: dict[str, Any] = {}
    for name, scores in at.items():
        found[name] = {score: compared(scores[score], whole[score]) for score in SCORES}
        found[name]["length"] = scores["words"][0] / words
        texts = [f"{score} {one['value']:.2f} ({one['less_all']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}])"
                 for score, one in found[name].items() if score != "length"]  # fmt: skip
        print(f"{name:>8} labels: {', '.join(texts)}, length {found[name]['length']:.3f}")
    lossless = {name: float(values[0]) for name, values in known[LOSSLESS].items()}
    print("lossless", lossless)
    conditions = {
        "study": "label_curve",
        "pair": options.pair,
        "prompts": len(prompts),
        "calls": options.calls,
    }
    keep(
        options, finite(provenance.plain({**conditions, "lossless": lossless, "labels": found})), {"seed": 0}
    )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
