"""Heads against the paper's rules on real text: the T5 pair on Multi30k En-De.

    python -m benchmarks.studies.multi30k_heads [--shared ../shared] [--work runs/multi30k] [--out FILE] [--quick]

The pair was trained on lines 1-23,000 of ``train``. Heads are fitted on 23,001-28,000 with early stopping on
28,001-29,000, chosen on ``val`` and reported on ``test_2016_flickr``. Teacher-forced traces, one gold token
each.

Three comparisons, each of risk against rejection rate, area differences with paired bootstrap intervals
over prompts: ``greedy`` (temperature 0: 1[y != emitted], all rules), ``argmax`` (temperature 1: zero_one
risk among position rules, the paper's own objective), ``sampled`` (temperature 1: risk 1 - pi(y) among
position rules).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import keep, study_flags
from deferral_train.collecting.api import collect
from deferral_train.collecting.config import CollectConfig
from deferral_train.evaluation.curves import area_difference, differences
from deferral_train.evaluation.offline import score_rules
from deferral_train.evaluation.table import ScoreTable
from deferral_train.heads.base import DeferralHead
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.rules.learned import LearnedRule
from deferral_train.traces import Traces, open_traces
from deferral_train.training.config import VERIFY_FEATURES, FitConfig
from deferral_train.training.fit import fit

PARTS = {  # name -> file, first line (0-based), number of lines
    "fit": ("train", 23_000, 5_000),
    "stop": ("train", 28_000, 1_000),
    "choose": ("val", 0, None),
    "test": ("test_2016_flickr", 0, None),
}
POSITION = ("chow", "chow_log", "diff", "diff_log", "opt", "opt_log", "bild")
OTHERS = ("token_v1", "token_v2", "token_v3", "lossy")
BESIDE = ("opt_verifier",)
RECALIBRATED: dict[
    str, dict[str, Any]
] = {  # OPT with max q and max p recalibrated on gold tokens, reported beside
    "opt_platt": {"head": "plug_in", "recalibration": "platt"},
    "opt_isotonic": {"head": "plug_in", "recalibration": "isotonic"},
}
DRAFT = ("chow", "chow_log")
SHARES = tuple(np.linspace(0, 1, 22)[1:-1])  # 20 interior rejection rates
FEATURES = (
    *VERIFY_FEATURES,
    *("drafter_at_verifier_argmax", "js", "drafter_sum_squares", "verifier_sum_squares", "product_sum"),
)
SAMPLED_FEATURES = (
    *(
        "drafter_sum_squares",
        "verifier_sum_squares",
        "product_sum",
        "drafter_max",
        "verifier_max",
        "tv",
        "kl",
    ),
    *("reverse_kl", "js", "cross_entropy", "drafter_entropy", "verifier_entropy", "position:log1p"),
    *("drafter_at_verifier_argmax", "verifier_at_drafter_argmax", "argmaxes_differ"),
)
COMMON: dict[str, Any] = {"batch_size": 2048, "epochs": 25, "patience": 6, "figure_every": 0}
ZERO_ONE: dict[str, dict[str, Any]] = {
    "gap_linear": {"head": "gap", "body": "linear", "features": FEATURES, "lr": 0.02},
    "gap_mlp": {"head": "gap", "hidden": (32,), "features": FEATURES, "weight_decay": 0.05, "lr": 0.01},
    "truth_mixture_linear": {"head": "truth_mixture", "body": "linear", "features": FEATURES, "lr": 0.02},
    "truth_mixture_mlp": {
        "head": "truth_mixture", "hidden": (16,), "features": FEATURES, "weight_decay": 0.05, "lr": 0.01
    },
}  # fmt: skip
SAMPLED: dict[str, dict[str, Any]] = {
    "gap_prob_linear": {
        "head": "gap", "loss": "prob", "body": "linear", "features": SAMPLED_FEATURES, "lr": 0.02
    },
    "gap_prob_mlp": {
        "head": "gap", "loss": "prob", "hidden": (32,), "features": SAMPLED_FEATURES,
        "weight_decay": 0.05, "lr": 0.01,
    },
}  # fmt: skip
DRAFT_HEADS: dict[str, dict[str, Any]] = {
    "draft_mlp": {"head": "gap", "stage": "draft", "hidden": (32,), "weight_decay": 0.05, "lr": 0.01},
    "draft_hidden": {
        "head": "gap", "stage": "draft", "hidden": (32,), "weight_decay": 0.3, "lr": 0.005,
        "features": ("drafter_max:logit", "drafter_max", "drafter_entropy", "position:log1p", "drafter_hidden"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Which candidates compete against which rules, at which temperature, by which risk."""

    candidates: Mapping[str, Mapping[str, Any]]
    rules: Sequence[str]
    beside: Sequence[str]
    temperature: float
    risk: str


COMPARISONS = {
    "greedy": Comparison(ZERO_ONE, (*POSITION, *OTHERS), BESIDE, 0.0, "emitted_risk"),
    "argmax": Comparison(ZERO_ONE, POSITION, BESIDE, 1.0, "risk"),
    "sampled": Comparison(SAMPLED, POSITION, BESIDE, 1.0, "emitted_risk"),
    "draft_greedy": Comparison(DRAFT_HEADS, DRAFT, (), 0.0, "emitted_risk"),
    "draft_argmax": Comparison(DRAFT_HEADS, DRAFT, (), 1.0, "risk"),
}


def part_prompts(shared: Path, part: str) -> list[Prompt]:
    """Prompts and references of a part."""
    file, start, count = PARTS[part]
    text = shared / "data" / "multi30k"
    german = str(text / f"{file}.de.gz")
    return read_prompts(text / f"{file}.en.gz", reference_path=german, start=start, limit=count)


def collect_parts(
    shared: Path, folder: Path, names: Sequence[str] = tuple(PARTS), top_k: int = 32
) -> dict[str, Traces]:
    """Traces of parts; finished ones are taken as they are."""
    pair = shared / "models" / "multi30k-en-de"
    config = CollectConfig(str(pair / "drafter"), str(pair / "verifier"), log_top_k=top_k, hidden="both")
    for name in names:
        collect(config, folder / name, prompts=part_prompts(shared, name))
    return {name: open_traces(folder / name) for name in names}


def fit_all(
    traces: Mapping[str, Traces], candidates: Mapping[str, Any], work: Path
) -> dict[str, DeferralHead]:
    """Every candidate, fitted; run again it reads the finished checkpoints."""
    found = {}
    for name, settings in candidates.items():
        config = FitConfig(train=traces["fit"], val=traces["stop"], **{**COMMON, **settings})
        found[name] = fit(config, work / "heads" / name).head
        found[name].save_pretrained(work / "heads" / name / "export")
        print(f"  fitted {name}: {found[name].num_parameters} parameters", flush=True)
    return found


def scores(
    traces: Traces, comparison: Comparison, heads: Mapping[str, DeferralHead], redraws: int
) -> ScoreTable:
    """Rules and heads over their dials."""
    rules: dict[str, Any] = {name: name for name in (*comparison.rules, *comparison.beside)}
    rules |= {name: LearnedRule(head=head, alpha=0.1) for name, head in heads.items()}
    # gap / tv of a head lies within what these alphas reach; draft heads divide by an estimate
    grid = {name: list(np.linspace(-0.6, 1.2, 61)) for name in heads}
    return score_rules(
        traces, rules, temperature=comparison.temperature, bootstrap=redraws, workers=1, grid=grid
    )


def compare(
    name: str, traces: Mapping[str, Traces], heads: Mapping[str, DeferralHead], work: Path, redraws: int
) -> dict[str, Any]:
    """Choose on ``choose`` by area, report on ``test``."""
    comparison = COMPARISONS[name]
    tried = scores(traces["choose"], comparison, heads, 0)
    areas = {key: tried.curve(key, comparison.risk).area()[0] for key in heads}
    best = min(areas, key=areas.__getitem__)
    recalibrated = fit_all(traces, RECALIBRATED, work) if comparison.beside else {}
    table = scores(traces["test"], comparison, {best: heads[best], **recalibrated}, redraws)
    curve = table.curve(best, comparison.risk)
    rows = {}
    for rule in (*comparison.rules, *comparison.beside, *recalibrated):
        other = table.curve(rule, comparison.risk)
        gaps = differences(curve, other, table.bootstrap, SHARES)
        rows[rule] = {
            "area": other.area()[0],
            "head_minus_rule": area_difference(curve, other, table.bootstrap).as_dict(),
            "significant_excess": [
                float(s) for s, gap in zip(SHARES, gaps) if gap.low is not None and gap.low > 0
            ],
        }
    return {
        "chosen": best,
        "choose_areas": areas,
        "area": curve.area()[0],
        "against": rows,
        "beside": comparison.beside,
    }


def show(name: str, result: Mapping[str, Any]) -> str:
    """Text table of one comparison."""
    lines = [f"== {name}: {result['chosen']}, area {result['area']:.5f} on test"]
    for rule, row in result["against"].items():
        gap = row["head_minus_rule"]
        verdict = "favourable" if gap["high"] is not None and gap["high"] < 0 else "NOT SIGNIFICANT"
        mark = " (beside)" if rule in result["beside"] else ""
        lines.append(
            f"  {rule + mark:<24} area {row['area']:.5f}  head minus rule {gap['value']:+.5f} "
            f"[{gap['low']:+.5f}, {gap['high']:+.5f}] {verdict}; "
            f"significant excess at {len(row['significant_excess'])} of {len(SHARES)} rates"
        )
    return "\n".join(lines)


def main() -> int:
    parser = study_flags(__doc__, "runs/multi30k")
    parser.add_argument("--redraws", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    options = parser.parse_args()
    if not (options.shared / "models" / "multi30k-en-de").is_dir():
        print(f"multi30k_heads: no pair and text under {options.shared}; nothing was run")
        return 0
    traces = collect_parts(options.shared, options.work / "traces")
    results = {}
    for name in options.only:
        heads = fit_all(traces, COMPARISONS[name].candidates, options.work)
        results[name] = compare(name, traces, heads, options.work, options.redraws)
        print(show(name, results[name]), flush=True)
    keep(options, {"results": results}, {"fit": 0, "bootstrap": 0})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
