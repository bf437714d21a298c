"""Heads on finished texts at temperature 1: both forms of the labels against rules without a head, decoded.

    python -m benchmarks.studies.sampled_heads --pair en-fr --position runs/rounds-position --token runs/rounds-token \
        --prompts test --limit 400 [--out FILE]

Needs folders of ``deferral-train rounds --temperature 1``, one or both: one with ``--label_form position``, one with
``--label_form token --objectives "[squared]"``. Every setting decodes the same prompts as ``decode`` does.
BLEU, chrF and TER at equal verifier calls per emitted token are linear between neighbouring settings; head minus each
rule with 95% paired intervals over redraws of prompts, in which settings are interpolated anew. Kept shares of the
heads and dials of the rules are fixed below; nothing is chosen on the prompts that are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import keep, study_flags
from benchmarks.sequence_labels import (
    LOSSLESS,
    SCORES,
    against,
    at_calls,
    counts_of,
    finite,
    prompt_weights,
    prompts_of,
    redrawn,
)
from deferral_train import provenance
from deferral_train.decoding.decode import decode
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.pair import load_pair
from deferral_train.decoding.settings import DecodeConfig, Settings
from deferral_train.evaluation.sequence import quantiles_of_estimates
from deferral_train.heads import DeferralHead
from deferral_train.heads.rules import learned_rule
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule
from deferral_train.traces import open_traces

# From all but lossless's calls to about half of them on this pair.
DIALS = {
    "opt": (-0.2, 0.0, 0.1, 0.2, 0.3, 0.45),
    "opt_verifier": (0.02, 0.05, 0.1, 0.18, 0.25, 0.36),
    "token_v1": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "token_v2": (0.1, 0.2, 0.3, 0.38, 0.46, 0.6),
}
KEPT = (0.3, 0.5, 0.65, 0.75, 0.85, 0.92)  # shares of the labelled places, by the heads' estimates
CALLS = (0.85, 0.70, 0.60)


def head_rules(name: str, folder: Path) -> dict[str, Rule]:
    """A head's rule at the alphas where it keeps about the shares `KEPT` of what its traces label."""
    head = DeferralHead.from_pretrained(folder / "head")
    traces = open_traces(folder / "traces" / "round-0")
    alphas = dict.fromkeys(quantiles_of_estimates(traces, head, KEPT))
    return {f"{name}:{alpha:g}": learned_rule(head, alpha) for alpha in alphas}


def compared(
    groups: Mapping[str, list[dict[str, np.ndarray]]], heads: list[str], lossless: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Values of every rule, and each head minus each rule, at each share of lossless's calls."""
    rows = []
    for share in CALLS:
        for score in SCORES:
            values = {
                name: at_calls(found, score, share * lossless["calls"]) for name, found in groups.items()
            }
            less = {
                head: {name: against(values[head], value) for name, value in values.items() if name != head}
                for head in heads
            }
            rows.append(
                {"calls": share, "score": score, "values": {n: v[0] for n, v in values.items()}, "less": less}
            )
    return rows


def main() -> int:
    parser = study_flags(__doc__, "runs/sampled-heads")
    parser.add_argument("--pair", default="en-fr", choices=("en-fr", "en-de"))
    parser.add_argument("--position", type=Path, help="folder of rounds with position labels")
    parser.add_argument("--token", type=Path, help="folder of rounds with token labels")
    parser.add_argument("--prompts", default="val", choices=("val", "test"))
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--limit", type=int, default=400)
    options = parser.parse_args()
    models = options.shared / "models" / f"multi30k-{options.pair}"
    pair = load_pair(str(models / "drafter"), str(models / "verifier"), options.device)
    prompts = prompts_of(options.shared, options.pair, options.prompts, options.start + options.limit)
    prompts = prompts[options.start :]
    groups: dict[str, dict[str, Rule]] = {
        name: {f"{name}:{dial:g}": make_rule(name).with_dial(dial) for dial in dials}
        for name, dials in DIALS.items()
    }
    heads = [name for name in ("position", "token") if getattr(options, name)]
    groups |= {name: head_rules(name, getattr(options, name)) for name in heads}
    every = {LOSSLESS: make_rule(LOSSLESS)} | {
        k: rule for rules in groups.values() for k, rule in rules.items()
    }
    how = Settings(temperature=1.0, max_new_tokens=64, batch_size=100)
    out = options.work / f"{options.pair}-{options.prompts}"
    decode(pair, prompts, every, DecodeConfig(how), out)
    lines: dict[str, list[dict[str, Any]]] = {label: [] for label in every}
    for row in read_lines(out / OUTPUTS):
        lines[row["rule"]].append(row)
    weights = prompt_weights(len(prompts))
    cache: dict[tuple[str, str], Any] = {}
    known = {label: redrawn(counts_of(rows, cache), weights) for label, rows in lines.items()}
    rows = compared({n: [known[k] for k in rules] for n, rules in groups.items()}, heads, known[LOSSLESS])
    for row in rows:
        values = ", ".join(f"{name} {value:.2f}" for name, value in row["values"].items())
        print(f"{row['calls']:.2f} {row['score']}: {values}")
        for head in heads:
            told = [
                f"{n} {d['difference']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
                for n, d in row["less"][head].items()
            ]
            print(f"     {head} less " + ", ".join(told))
    points = {label: {name: float(values[0]) for name, values in one.items()} for label, one in known.items()}
    result = {
        "study": "sampled_heads", "pair": options.pair, "prompts": options.prompts, "start": options.start,
        "count": len(prompts), "temperature": 1.0, "at_calls": rows, "points": points,
    }  # fmt: skip
    keep(options, finite(provenance.plain(result)), {"seed": 0})
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
