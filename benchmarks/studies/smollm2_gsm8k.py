"""A real language model: sequence labels on SmolLM2-135M-Instruct and GSM8K, heads against every rule, decoded.

    python -m benchmarks.studies.smollm2_gsm8k --pair runs/smollm2/pair [--out FILE]

Needs the pair that ``configs/smollm2.yaml`` makes and the shared GSM8K. Labels are collected along the verifier's own
text and scored by chrF1 against it (no references), about 400; four ridge regressions read the scalars, these with the
verifier's hidden state, with the two tokens' embeddings, and with both. Every setting is decoded greedily on questions
of the test part, in blocks of 5. At temperature 0 rules that keep the same places are one: opt and token_v1,
opt_verifier and token_v2. Quality is what the verifier makes of the finished text (nats a token), and whether its last
number is that of the verifier's own text; calls are verifier calls per emitted token. Between neighbouring settings
numbers are linear; 95% paired intervals over redraws of prompts, in which settings are interpolated anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import keep, study_flags
from benchmarks.greedy_tree import Row, decode_tree
from benchmarks.sequence_labels import at_calls, finite, prompt_weights, settings_of
from deferral_train import provenance
from deferral_train.collecting.api import collect
from deferral_train.collecting.config import CollectConfig
from deferral_train.decoding.pair import Pair, load_pair
from deferral_train.evaluation.quality import chrf1, gsm8k
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.evaluation.sequence import quantiles_of_estimates
from deferral_train.heads.lookups import FIELDS_READ
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule
from deferral_train.traces import Traces, open_traces
from deferral_train.traces.sequence import labelled_rows
from deferral_train.training.config import SEQUENCE_FEATURES, FitConfig
from deferral_train.training.fit import fit

RULES = ("opt", "opt_verifier", "token_v3", "typical", "fuzzy")
KEPT = (0.2, 0.4, 0.6, 0.8)
CALLS = (0.85, 0.70, 0.60)
LOSSLESS = "lossless"
METRICS = ("chrf1",)  # two need a first look at the deviations, which labels so few questions twice
FIRST = 2000  # row of the training part behind those that configs/smollm2.yaml uses
SCALARS = tuple(name for name in SEQUENCE_FEATURES if name not in FIELDS_READ)
HEADS = {
    "scalars": SCALARS,
    "scalars and hidden state": (*SCALARS, "verifier_hidden"),
    "scalars and embeddings": SEQUENCE_FEATURES,
    "all": (*SEQUENCE_FEATURES, "verifier_hidden"),
}
HEAD = "head: "


def labelled(pair: Pair, prompts: Sequence[Prompt], options: argparse.Namespace) -> Traces:
    """Sequence labels along the verifier's own text, scored against it."""
    config = CollectConfig(
        prefixes="verifier",
        temperature=0.0,
        log_top_k=0,
        hidden="verifier",
        labels="sequence",
        label_metric=METRICS,
        label_reference="verifier",
        label_share=options.share,
        max_new_tokens=options.tokens,
        chunk_prompts=12,
    )
    folder = options.work / "labels"
    collect(config, folder, models=pair.models, prompts=prompts, scores=make_scorers(METRICS))
    return open_traces(folder)


def heads_of(pair: Pair, traces: Traces, work: Path) -> dict[str, dict[str, Rule]]:
    """Settings of every head, at alphas where it keeps the shares `KEPT` of the labelled places."""
    matrix = pair.models.verifier.get_output_embeddings().weight.detach().float().cpu()
    found: dict[str, dict[str, Rule]] = {}
    for name, features in HEADS.items():
        config = FitConfig(
            train=traces,
            features=features,
            truth="sequence",
            body="linear",
            objective="ridge",
            val_fraction=0.2,
            verifier=matrix,
        )
        head = fit(config, work / name.replace(" ", "-"), resume=False).head
        alphas = quantiles_of_estimates(traces, head, KEPT)
        found[HEAD + name] = {f"{HEAD}{name}:{alpha:g}": learned_rule(head, alpha) for alpha in alphas}
    return found


def sums_of(rows: Sequence[Row], own: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Sums of one setting by prompt, each [P]; ``own`` is the verifier's text of every prompt."""
    rows = sorted(rows, key=lambda row: row.id)
    columns = {
        "emitted": [len(row.tokens) for row in rows],
        "calls": [row.calls for row in rows],
        "nats": [row.log_likelihood for row in rows],
        "number": [gsm8k(row.text, own[row.id]) for row in rows],
        "chrf1": [chrf1(row.text, own[row.id]) for row in rows],
        "same": [float(row.text == own[row.id]) for row in rows],
    }
    return {name: np.array(column, dtype=float) for name, column in columns.items()}


def redrawn(sums: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every quantity of a setting in every redraw [B]."""
    total = {name: weights @ column for name, column in sums.items()}
    found = {name: 100 * total[name] / weights.sum(1) for name in ("number", "chrf1", "same")}
    return found | {name: total[name] / total["emitted"] for name in ("calls", "nats")}


def compared(
    groups: Mapping[str, Sequence[Mapping[str, np.ndarray]]], lossless: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Every rule and head at shares of lossless's calls, each head less the best rule without one."""
    rows = []
    for share in CALLS:
        calls = share * lossless["calls"]
        row: dict[str, Any] = {"calls": share}
        for name in ("nats", "number", "chrf1"):
            at = {label: at_calls([*own, lossless], name, calls) for label, own in groups.items()}
            rules = np.stack([values for label, values in at.items() if not label.startswith(HEAD)])
            best = np.nanmax(rules, axis=0)
            row[name] = {label: {"value": values[0]} for label, values in at.items()}
            for label in filter(lambda one: one.startswith(HEAD), at):
                low, high = np.nanquantile((at[label] - best)[1:], [0.025, 0.975])
                row[name][label] |= {"less_best_rule": (at[label] - best)[0], "low": low, "high": high}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        for name in ("nats", "number", "chrf1"):
            lines.append(f"{row['calls']:.2f} of the calls, {name}")
            for label, one in row[name].items():
                more = ""
                if "low" in one:
                    more = f"  {one['less_best_rule']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
                lines.append(f"    {label:<32} {one['value']:8.3f}{more}")
    return "\n".join(lines)


def main() -> int:
    parser = study_flags(__doc__, "runs/smollm2-study")
    parser.add_argument("--pair", type=Path, required=True, help="folder with drafter/ and verifier/")
    parser.add_argument("--fit", type=int, default=36, help="questions that are labelled")
    parser.add_argument("--share", type=float, default=0.35, help="of the places of each that are labelled")
    parser.add_argument("--limit", type=int, default=20, help="test questions that are decoded")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of a text")
    options = parser.parse_args()
    pair = load_pair(str(options.pair / "drafter"), str(options.pair / "verifier"), "cpu", "float32")
    texts = options.shared / "data" / "gsm8k"
    began = time.process_time()
    traces = labelled(pair, read_prompts(texts / "train.jsonl.gz", start=FIRST, limit=options.fit), options)
    rows = labelled_rows(traces).numpy()
    seconds = {"labels": time.process_time() - began}
    print(f"{int(rows.sum())} labels in {seconds['labels']:.0f} s")
    groups = {name: settings_of(name, traces, KEPT) for name in RULES} | heads_of(pair, traces, options.work)
    every = {LOSSLESS: make_rule(LOSSLESS)} | {k: rule for one in groups.values() for k, rule in one.items()}
    prompts = read_prompts(texts / "test.jsonl.gz", limit=options.limit)
    began = time.process_time()
    decoded = decode_tree(pair, prompts, every, max_new_tokens=options.tokens, chunk=10)
    seconds["decoding"] = time.process_time() - began
    own = {row.id: row.text for row in decoded if row.rule == LOSSLESS}
    weights = prompt_weights(len(prompts))
    known = {
        label: redrawn(sums_of([row for row in decoded if row.rule == label], own), weights)
        for label in every
    }
    by_rule = {name: [known[label] for label in one] for name, one in groups.items()}
    found = compared(by_rule, known[LOSSLESS])
    print(table(found))
    agreement = traces.column("drafter_argmax") == traces.column("verifier_argmax")
    result = {
        "study": "smollm2_gsm8k",
        "prompts": {"labelled": options.fit, "decoded": len(prompts), "most_tokens": options.tokens},
        "labels": {"count": int(rows.sum()), "share": options.share, "metrics": METRICS,
                   "places": len(traces), "agreement": float(np.mean(agreement)),
                   "scales": traces.manifest.labels["scales"]},
        "drafter": {"accepted_when_sampling": float(1 - np.mean(traces.column("tv_unscaled")))},
        "cpu_seconds": seconds,
        "at_calls": found,
        "points": {label: {name: float(v[0]) for name, v in one.items()} for label, one in known.items()},
    }  # fmt: skip
    keep(options, finite(provenance.plain(result)), {"seed": 0})
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
