"""Exact regret on the synthetic language: heads against the plug-in rules, as fit traces grow.

    python -m benchmarks.studies.synthetic_regret [--config configs/synthetic.yaml] [--work runs/synthetic] [--out
    FILE]

At every size all candidates are fitted, the one of least regret on the ``choose`` texts is taken, and it
alone is scored on the ``test`` texts; at the largest size once per seed, and there also the best one that has no
memory of the traces. Intervals: bootstrap over texts, rules paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.common import flags, keep
from deferral_train.collecting.synthetic import collect_synthetic
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.plug_in import PlugInHead
from deferral_train.heads.recalibration import fit_temperature, temper
from deferral_train.pairs.synthetic import SyntheticConfig, build_language
from deferral_train.rules import make_rule, risks
from deferral_train.traces import Traces, truth
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import FitResult, fit
from deferral_train.training.preparation import fit_recalibration
from deferral_train.training.tracking import predict


class Study:
    """One variant of the language: its traces, and regret of any decision on its test texts."""

    def __init__(self, config: Mapping[str, Any], variant: str, work: Path) -> None:
        self.config, self.variant, self.work = config, variant, work / variant
        scale = config["variants"][variant]
        language = build_language(SyntheticConfig(**config["language"], drafter_scale=scale))
        self.traces = {
            name: collect_synthetic(
                language, self.work / "traces" / name, texts, config["length"],
                seed=config["seeds"][name], top_k=config["top_k"],
            )
            for name, texts in config["texts"].items()
        }  # fmt: skip
        test = self.traces["test"]
        self.alphas = torch.tensor(config["alphas"])
        self.gap, self.tv = truth.gap(test, "exact").double(), test.summary(["tv"])["tv"].double()
        self.bootstrap = PromptBootstrap(len(test.prompt_ids), **config["bootstrap"])

    def regret(self, defer: Tensor) -> np.ndarray:
        """Exact regret ``[N, A]`` of decisions ``[N, A]`` on the test texts."""
        price = self.alphas.double() * self.tv.unsqueeze(-1)
        return risks.regret(self.gap.unsqueeze(-1), price, defer, 1.0).numpy()

    def per_text(self, values: np.ndarray) -> np.ndarray:
        """Sums over each test text of values [N]."""
        rows = self.traces["test"].prompt_of_row
        return np.bincount(rows, weights=values, minlength=len(self.traces["test"].prompt_ids))

    def plug_ins(self) -> dict[str, Tensor]:
        """Decisions of the baselines on the test texts; temperatures are fitted on all fit texts."""
        test = self.traces["test"]
        summary = test.summary()
        found = {
            name: torch.stack([make_rule(name, alpha=float(a)).defer(summary) for a in self.alphas], -1)
            for name in ("opt", "diff", "opt_verifier")
        }
        found["opt_recalibrated_distribution"] = self._at_all(self._tempered_gap())
        for kind in ("platt", "isotonic"):
            head = PlugInHead(recalibration=kind)
            fit_recalibration(head, self.traces["fit"])
            found[f"opt_recalibrated_{kind}"] = self._at_all(head.gap(summary).double())
        return found

    def _at_all(self, gap: Tensor) -> Tensor:
        return gap.unsqueeze(-1) > self.alphas.double() * self.tv.unsqueeze(-1)

    def _tempered_gap(self) -> Tensor:
        """max p - max q after each distribution's temperature was fitted on the gold tokens of the fit texts."""
        best, size = {}, self.config["language"]["vocab_size"]
        for role in ("drafter", "verifier"):
            logs, tail, gold = distribution_of(self.traces["fit"], role)
            temperature = fit_temperature(logs, tail, gold, size)
            print(f"  {role}: temperature {temperature:.3f} fitted on {len(gold)} gold tokens")
            logs, tail, _ = distribution_of(self.traces["test"], role)
            best[role] = temper(logs, tail, size, temperature).exp().amax(-1)
        return best["verifier"] - best["drafter"]


def distribution_of(traces: Traces, role: str) -> tuple[Tensor, Tensor, Tensor]:
    """A model's logged distribution [N, K], its tail [N], and the gold token's place in it [N], -1 where absent."""
    logs = torch.from_numpy(traces.column(f"{role}_top_{role}_logprobs").astype(np.float32))
    ids = torch.from_numpy(traces.column(f"{role}_top_ids").astype(np.int64))
    hit = ids == torch.from_numpy(traces.column("gold").astype(np.int64)).unsqueeze(-1)
    place = torch.where(hit.any(-1), hit.int().argmax(-1), torch.full((len(ids),), -1))
    return logs, (1 - logs.exp().sum(-1)).clamp(1e-9, 1), place


def decide(head: DeferralHead, traces: Traces, alphas: Tensor) -> Tensor:
    """Decisions ``[N, A]`` of a head over traces."""
    summary = traces.summary(sorted({*head.features, "tv"}))
    with torch.no_grad():
        return predict(head, {"x": head.columns(summary), "tv": summary["tv"]}, alphas)["defer"]


def fit_candidates(study: Study, size: int, seed: int) -> dict[str, FitResult]:
    """Every candidate fitted on the first ``size`` tokens."""
    config = study.config
    fit_traces = study.traces["fit"]
    part = fit_traces.select_prompts(fit_traces.prompt_ids[: size // config["length"]])
    results = {}
    for name, settings in config["candidates"].items():
        wanted = FitConfig(
            train=part,
            val=study.traces["choose"],
            alphas=config["alphas"],
            seed=seed,
            **{**config["common"], **config["sizes"][size], **settings},
        )
        results[name] = fit(wanted, study.work / "fit" / f"{size}-{seed}-{name}", resume=False)
    return results


def least(results: Mapping[str, FitResult]) -> str:
    """Name of the candidate of least regret on the ``choose`` texts."""
    return min(results, key=lambda name: results[name].metrics["regret"])


def run_variant(study: Study) -> dict[str, Any]:
    """Table of one variant."""
    rows = {name: study.regret(defer) for name, defer in study.plug_ins().items()}
    chosen = {}
    sizes, seeds = list(study.config["sizes"]), study.config["fit_seeds"]
    for size, seed in [*((size, seeds[0]) for size in sizes[:-1]), *((sizes[-1], seed) for seed in seeds)]:
        results = fit_candidates(study, size, seed)
        row = f"head_{size}" if size != sizes[-1] else f"head_{size}_seed_{seed}"
        wanted = {row: least(results)}
        if size == sizes[-1] and seed == seeds[0]:
            bare = {name: r for name, r in results.items() if r.head.inputs.memory is None}
            wanted[f"head_{size}_without_memory"] = least(bare)
        for key, name in wanted.items():
            rows[key] = study.regret(decide(results[name].head, study.traces["test"], study.alphas))
            chosen[key] = {"head": name, "parameters": results[name].head.num_parameters}
            print(f"  {key}: {name}, regret {rows[key].mean():.6f}", flush=True)
        chosen[row]["choose_regret"] = {name: r.metrics["regret"] for name, r in results.items()}
    return {"rules": {name: describe(study, rows, name) for name in rows}, "chosen": chosen}


def describe(study: Study, rows: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Mean regret with its interval, the ratio to OPT's and the difference to it, and regret per alpha."""
    boot, counts = study.bootstrap, study.per_text(np.ones(len(study.gap)))
    own, opt = (study.per_text(rows[key].mean(1)) for key in (name, "opt"))
    redrawn, redrawn_opt = boot.sums(own), boot.sums(opt)
    ratio = boot.interval(float(own.sum() / opt.sum()), redrawn / redrawn_opt)
    return {
        "regret": boot.ratio(own, counts).as_dict(),
        "ratio_to_opt": ratio.as_dict(),
        "minus_opt": boot.ratio(own - opt, counts).as_dict(),
        "per_alpha": rows[name].mean(0).tolist(),
    }


def table(result: Mapping[str, Any]) -> str:
    """Text table of one variant."""
    lines = [f"{'rule':<28}{'exact regret':>14}{'95% interval':>24}{'of OPT':>9}{'95% interval':>18}"]
    for name, row in result["rules"].items():
        r, s = row["regret"], row["ratio_to_opt"]
        lines.append(
            f"{name:<28}{r['value']:>14.6f}{r['low']:>13.6f} ..{r['high']:.6f}"
            f"{s['value']:>9.3f}{s['low']:>9.3f} ..{s['high']:.3f}"
        )
    return "\n".join(lines)


def verdicts(results: Mapping[str, Any], sizes: Sequence[int], seeds: Sequence[int]) -> dict[str, bool]:
    """The claims of this study, each as it came out; those on the largest size must hold for every seed."""
    last = [f"head_{sizes[-1]}_seed_{seed}" for seed in seeds]
    claims = {}
    if "doubled" in results:
        rules = results["doubled"]["rules"]
        head = max(rules[name]["regret"]["value"] for name in last)
        claims["doubled: at most 0.25 of OPT"] = all(
            rules[name]["ratio_to_opt"]["value"] <= 0.25 for name in last
        )
        for name in ("opt_recalibrated_distribution", "opt_recalibrated_platt", "opt_verifier"):
            claims[f"doubled: below {name}"] = head < rules[name]["regret"]["value"]
    if "as_they_come" in results:
        rules = results["as_they_come"]["rules"]
        claims["as they come: not above OPT beyond its interval"] = all(
            rules[name]["minus_opt"]["low"] <= 0 for name in last
        )
    for variant, result in results.items():
        rows = [*(f"head_{size}" for size in sizes[:-1]), last[0]]
        falls = [result["rules"][row]["regret"]["value"] for row in rows]
        claims[f"{variant}: regret falls with every size"] = falls == sorted(falls, reverse=True)
    return claims


def main() -> int:
    parser = flags(__doc__, ("cpu",), threads=None)
    parser.add_argument("--config", type=Path, default=Path("configs/synthetic.yaml"))
    parser.add_argument("--work", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--variants", nargs="+", help="default: all of the config")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    results = {}
    for variant in options.variants or list(config["variants"]):
        print(f"== {variant}", flush=True)
        results[variant] = run_variant(Study(config, variant, options.work))
        print(table(results[variant]), flush=True)
    claims = verdicts(results, list(config["sizes"]), config["fit_seeds"])
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    seeds = {**config["seeds"], **{f"fit {seed}": seed for seed in config["fit_seeds"]}}
    keep(options, {"config": config, "results": results, "claims": claims}, seeds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
