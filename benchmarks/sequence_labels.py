"""Heads on what the finished text loses against every rule without a head, decoded: quality at equal verifier calls.

    python -m benchmarks.sequence_labels --pair en-fr --rounds runs/rounds-fr --prompts test [--out FILE]

Needs a folder of ``deferral-train rounds``. Rules without a head get eight settings each, at which they keep given
shares of the labelled places of the fit lines; the head gets eight, at shares of its own estimates. Nothing is chosen
on the prompts that are decoded. At temperature 0 rules that keep the same places are one: opt, diff and token_v1;
opt_verifier and token_v2; token_v3 and logit_margin. Reported at 0.85, 0.70 and 0.60 of lossless's verifier calls per
emitted token: BLEU, chrF and TER of sacrebleu and the length ratio, linear between neighbouring settings, and head
minus the best rule there, with 95% paired bootstrap intervals over prompts, in which settings are interpolated anew
in every redraw: against the best rule of each redraw, which favours the rules, and against each rule by itself. The
fewest calls within 0.2 BLEU of lossless's come with their interval. Texts and calls are those of ``deferral-train
decode`` (benchmarks/greedy_tree.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import study_flags
from benchmarks.greedy_tree import decode_tree
from deferral_train import provenance
from deferral_train.decoding.pair import load_pair
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.families import make_families
from deferral_train.evaluation.sequence import quantiles_of_estimates
from deferral_train.evaluation.sequence_scores import TOKEN_NEEDS, defers
from deferral_train.heads import DeferralHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.rules.base import PositionRule, Rule, TokenRule
from deferral_train.rules.registry import make_rule
from deferral_train.traces import Traces, open_traces
from deferral_train.traces.sequence import labelled_rows, sequence_summary

RULES = (
    "opt_verifier",
    "opt",
    "token_v3",
    "chow",
    "chow_log",
    "opt_log",
    "bild",
    "typical",
    "fuzzy",
    "lossy",
)
KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
CALLS = (0.85, 0.70, 0.60)
GRID = 400
LOSSLESS = "lossless"
HIGHER = {"bleu": True, "chrf": True, "ter": False}


def prompts_of(shared: Path, pair: str, part: str, limit: int | None) -> list[Prompt]:
    """Prompts of a part of Multi30k: ``val`` or ``test``."""
    source, target = pair.split("-")
    name = {"val": "val", "test": "test_2016_flickr"}[part]
    folder = shared / "data" / "multi30k"
    return read_prompts(
        folder / f"{name}.{source}.gz", "text", reference_path=folder / f"{name}.{target}.gz", limit=limit
    )


def settings_of(given: str | Rule, traces: Traces, shares: Sequence[float] = KEPT) -> dict[str, Rule]:
    """A rule at the dial values where it keeps about these shares of the labelled places."""
    family = make_families([given], GRID)[0]
    name = family.rule.name
    rules = family.settings
    if not isinstance(family.rule, PositionRule | TokenRule):
        # Their decision is a distribution: spread over the dial.
        picked = rules[:: max(1, len(rules) // (len(shares) + 1))][1 : len(shares) + 1]
        return {f"{name}:{rule.dial_value:g}": rule for rule in picked}
    needs = sorted({*family.rule.needs, *TOKEN_NEEDS, "tv"})
    summary = sequence_summary(traces, needs).select(labelled_rows(traces))
    kept = np.array([1 - float(defers(rule, summary).double().mean()) for rule in rules])
    picked = [rules[int(np.abs(kept - share).argmin())] for share in shares]
    return {f"{name}:{rule.dial_value:g}": rule for rule in picked}


def head_settings(folder: Path, traces: Traces, label: str = "head") -> dict[str, Rule]:
    """A head's rule at alphas where it keeps about the shares `KEPT` of the labelled places."""
    head = DeferralHead.from_pretrained(folder)
    return {
        f"{label}:{alpha:g}": learned_rule(head, alpha)
        for alpha in quantiles_of_estimates(traces, head, KEPT)
    }


@dataclass(frozen=True)
class Counts:
    """Sums of one setting by prompt: sacrebleu's counts for each metric, words, calls, emitted tokens; [P, K]."""

    bleu: np.ndarray
    chrf: np.ndarray
    ter: np.ndarray
    words: np.ndarray
    calls: np.ndarray
    emitted: np.ndarray


def counts_of(
    rows: Sequence[Mapping[str, Any]], cache: dict[tuple[str, str], tuple[Any, Any, Any]]
) -> Counts:
    """Counts of one rule's lines, in the order of their prompts' ids."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    rows = sorted(rows, key=lambda row: str(row["id"]))
    metrics = (BLEU(), CHRF(), TER())
    found = []
    for row in rows:
        key = (row["text"], row["reference"])
        if key not in cache:
            cache[key] = tuple(m._extract_corpus_statistics([key[0]], [[key[1]]])[0] for m in metrics)  # type: ignore[assignment]
        found.append(cache[key])
    bleu, chrf, ter = (np.array([one[i] for one in found], dtype=float) for i in range(3))
    words = np.array([[len(row["text"].split())] for row in rows], dtype=float)
    calls, emitted = (
        np.array([[row["counts"][name]] for row in rows], dtype=float)
        for name in ("verifier_calls", "emitted")
    )
    return Counts(bleu, chrf, ter, words, calls, emitted)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU [B] of summed counts [B, 10]: lengths, then correct and total n-grams of orders 1 to 4."""
    ours, theirs, correct, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    brevity = np.where(ours < theirs, np.exp(1 - theirs / np.maximum(ours, 1)), 1.0)
    return 100 * brevity * np.exp(np.log(correct / total).mean(1))


def chrf(sums: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """Corpus chrF [B] of summed counts [B, 18]: n-grams of ours, theirs and both for orders 1 to 6."""
    ours, theirs, both = (sums[:, place::3] for place in range(3))
    precision, recall = (both / ours).mean(1), (both / theirs).mean(1)
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def ter(sums: np.ndarray) -> np.ndarray:
    """Corpus TER [B] of summed counts [B, 2]: edits and reference words."""
    return 100 * sums[:, 0] / sums[:, 1]


SCORES = {"bleu": bleu, "chrf": chrf, "ter": ter}


def prompt_weights(prompts: int, redraws: int = 1000) -> np.ndarray:
    """Weights of prompts [1 + redraws, prompts]: all alike first, then of every redraw."""
    return np.vstack([np.ones(prompts), PromptBootstrap(prompts, redraws).weights])


def redrawn(counts: Counts, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every quantity of a setting in every redraw [B]; the first row of weights is all ones."""
    found = {name: score(weights @ getattr(counts, name)) for name, score in SCORES.items()}
    found["words"] = (weights @ counts.words)[:, 0]
    found["calls"] = (weights @ counts.calls)[:, 0] / (weights @ counts.emitted)[:, 0]
    found["total_calls"] = (weights @ counts.calls)[:, 0]
    return found


def at_calls(settings: Sequence[Mapping[str, np.ndarray]], name: str, calls: np.ndarray) -> np.ndarray:
    """A quantity at given calls [B], linear between neighbouring settings; NaN beyond the outermost."""
    x = np.stack([one["calls"] for one in settings])
    y = np.stack([one[name] for one in settings])
    order = np.argsort(x, axis=0)
    x, y = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    found = [np.interp(calls[b], x[:, b], y[:, b], np.nan, np.nan) for b in range(len(calls))]
    return np.array(found)


def compared(
    rules: Mapping[str, list[dict[str, np.ndarray]]], head: str, lossless: dict[str, np.ndarray]
) -> list[Any]:
    """Head against the best rule at each share of lossless's calls."""
    rows = []
    for share in CALLS:
        calls = share * lossless["calls"]
        row: dict[str, Any] = {"calls": share}
        for name, higher in HIGHER.items():
            own = at_calls(rules[head], name, calls)
            others = {r: at_calls(found, name, calls) for r, found in rules.items() if r != head}
            sign = 1 if higher else -1
            reach = {r: v for r, v in others.items() if not np.isnan(v[0])}
            best = np.nanmax(np.stack([sign * v for v in reach.values()]), axis=0) * sign
            low, high = np.nanquantile((own - best)[1:], [0.025, 0.975])
            row[name] = {
                "head": own[0],
                "best_rule": best[0],
                "rule": max(reach, key=lambda r: sign * reach[r][0]),
                "difference": own[0] - best[0],
                "low": low,
                "high": high,
                "rules": {r: v[0] for r, v in others.items()},
                "against": {r: against(own, v) for r, v in reach.items()},
            }
        length = at_calls(rules[head], "words", calls) / lossless["words"]
        row["length_over_lossless"] = length[0]
        row["total_calls"] = at_calls(rules[head], "total_calls", calls)[0]
        rows.append(row)
    return rows


def against(own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Difference of two scores [B], the first as they are, with its interval over the redraws."""
    low, high = np.nanquantile((own - other)[1:], [0.025, 0.975])
    return {"difference": float(own[0] - other[0]), "low": float(low), "high": float(high)}


def fewest_calls(
    settings: Sequence[Mapping[str, np.ndarray]], lossless: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Least calls over lossless's at which BLEU is within 0.2 of lossless's, on a fine grid between settings."""
    points = [*settings, lossless]
    x = np.stack([one["calls"] for one in points]) / lossless["calls"]
    y = np.stack([one["bleu"] for one in points]) - lossless["bleu"]
    found = np.array([_first_within(x[:, b], y[:, b], -0.2) for b in range(x.shape[1])])
    low, high = np.quantile(found[1:], [0.025, 0.975]) if len(found) > 1 else (math.nan, math.nan)
    return {"calls": float(found[0]), "low": float(low), "high": float(high)}


def _first_within(x: np.ndarray, y: np.ndarray, bound: float) -> float:
    """Least x at which y, linear between points, is at least a bound that its last point meets."""
    shares = np.linspace(0.3, 1.0, 701)
    order = np.argsort(x)
    near = np.interp(shares, x[order], y[order], left=-np.inf) >= bound
    return float(shares[near][0])


def finite(value: Any) -> Any:
    """A copy in which what is no number, as beyond a rule's outermost settings, is None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    parser = study_flags(__doc__, "runs/sequence-labels")
    parser.add_argument("--pair", default="en-fr", choices=("en-fr", "en-de"))
    parser.add_argument("--rounds", type=Path, required=True, help="folder of deferral-train rounds")
    parser.add_argument("--head", type=Path, help="another head of it; default the chosen one")
    parser.add_argument("--prompts", default="val", choices=("val", "test"))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--redraws", type=int, default=1000)
    options = parser.parse_args()
    labels = open_traces(options.rounds / "traces" / "round-0")
    head = options.head or options.rounds / "head"
    latest = sorted((options.rounds / "traces").iterdir())[-1]
    groups = {name: settings_of(name, labels) for name in options.rules}
    groups["head"] = head_settings(head, open_traces(latest))
    models = options.shared / "models" / f"multi30k-{options.pair}"
    pair = load_pair(str(models / "drafter"), str(models / "verifier"), options.device)
    prompts = prompts_of(options.shared, options.pair, options.prompts, options.limit)
    every = {LOSSLESS: make_rule(LOSSLESS)} | {
        k: rule for rules in groups.values() for k, rule in rules.items()
    }
    lines: dict[str, list[dict[str, Any]]] = {label: [] for label in every}
    for row in decode_tree(pair, prompts, every):
        lines[row.rule].append(row.as_line())
    weights = prompt_weights(len(prompts), options.redraws)
    cache: dict[tuple[str, str], Any] = {}
    known = {label: redrawn(counts_of(rows, cache), weights) for label, rows in lines.items()}
    by_rule = {name: [known[label] for label in rules] for name, rules in groups.items()}
    rows = compared(by_rule, "head", known[LOSSLESS])
    fewest = {name: fewest_calls(found, known[LOSSLESS]) for name, found in by_rule.items()}
    points = {label: {name: float(values[0]) for name, values in one.items()} for label, one in known.items()}
    print(table(rows))
    print("fewest calls within 0.2 BLEU of lossless:", json.dumps(fewest))
    if options.out:
        record = {
            "study": "sequence_labels", "pair": options.pair, "prompts": options.prompts, "count": len(prompts),
            "head": DeferralHead.from_pretrained(head).metadata, "at_calls": rows, "fewest_calls": fewest,
            "points": points, "provenance": provenance.collect({"seed": 0}),
        }  # fmt: skip
        provenance.write_json(options.out, finite(provenance.plain(record)))
    return 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["calls  metric   head   best rule                 difference [95%]"]
    for row in rows:
        for name in HIGHER:
            one = row[name]
            lines.append(
                f"{row['calls']:.2f}   {name:<5} {one['head']:7.2f}  {one['best_rule']:6.2f} {one['rule']:<16} "
                f"{one['difference']:+6.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
            )
            own = [f"{r} [{d['low']:+.2f}, {d['high']:+.2f}]" for r, d in one["against"].items()]
            lines.append("               against each: " + ", ".join(own))
        lines.append(f"       length over lossless's {row['length_over_lossless']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
