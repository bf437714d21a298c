"""Every method at matched verifier calls, greedy and sampled, beside a head fitted on what finished texts lose.

    python -m benchmarks.methods --pair en-fr --rounds runs/rounds-fr --limit 300 [--temperatures 0 1] [--out FILE]

Needs a folder of ``deferral-train rounds``: its head, and its traces, from which csd's table of rejected pairs is
counted. Greedy texts come from one walk of the shared tree (benchmarks/greedy_tree.py), those of rules that judge
blocks and all sampled ones from ``Pair.generate``. Dials are chosen on other lines of ``val`` (the last), where their
calls lie around the wished share of lossless's calls per token. On the first ``--limit`` lines every quantity is
linear between neighbouring settings, and method minus head has a 95% paired interval over redraws of prompts, settings
interpolated anew in each. Sampled texts are ``--samples`` a prompt, with the same seeds for all methods.

Block verification has no dial: what it saves is measured at equal output distribution (bonus ``exact``), rule by rule,
and what it changes with the verifier's bonus beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import study_flags
from benchmarks.greedy_tree import decode_tree
from benchmarks.sequence_labels import (
    GRID,
    KEPT,
    LOSSLESS,
    SCORES,
    Counts,
    at_calls,
    counts_of,
    finite,
    head_settings,
    prompts_of,
    redrawn,
    settings_of,
)
from deferral_train import provenance
from deferral_train.decoding.pair import Pair, load_pair
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.sequence import quantiles_of_estimates
from deferral_train.heads import DeferralHead
from deferral_train.heads.rejected_pairs import count_rejections
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import RULES, BlockRule, LawRule, make_rule
from deferral_train.rules.base import Rule
from deferral_train.rules.rejected_pairs import CSD, RejectedPairs
from deferral_train.traces import Traces, open_traces

METHODS = (
    "chow", "chow_log", "diff", "diff_log", "opt", "opt_log", "token_v1", "token_v2", "token_v3", "lossy", "bild",
    "judi", "csd", "ears", "fly", "opt_verifier", "fuzzy", "typical",
)  # fmt: skip
HEAD = "sequence head"
TOGETHER = {"lossless": {}, "opt": {"alpha": 0.2}, "token_v3": {"alpha": 0.5}, "lossy": {"alpha": 0.5}}
PILOT = 40  # lines on which dials are looked for
TRIED = 6  # dials of each method there
REFINED = 2  # times that dials between those tried are tried in turn: calls are far from linear in some
SPREAD = (0.86, 1.0, 1.16)  # shares of the wished calls that settings are decoded at
NEW_TOKENS, DRAFTED, BATCH = 64, 5, 100

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """A pair, its prompts and how texts are decoded.

    Attributes:
        prompts: of the table. pilot: others, on which dials are chosen. samples: texts of each prompt where sampled.
    """

    pair: Pair
    prompts: list[Prompt]
    pilot: list[Prompt]
    samples: int

    def decode(
        self, rule: Rule, temperature: float, prompts: Sequence[Prompt], seed: int = 0, **options: Any
    ) -> Lines:
        """Lines of one rule as ``outputs.jsonl`` has them."""
        found = self.pair.generate(
            list(prompts), rule=rule, temperature=temperature, seed=seed, max_new_tokens=NEW_TOKENS,
            num_draft_tokens=DRAFTED, batch_size=BATCH, **options,
        )  # fmt: skip
        return [
            {"id": prompt.id, "text": text, "reference": prompt.reference, "counts": found.stats.row(n)}
            for n, (prompt, text) in enumerate(zip(prompts, found.texts))
        ]

    def counts(self, rule: Rule, temperature: float, cache: dict[Any, Any], **options: Any) -> Counts:
        """Counts by prompt, summed over the samples."""
        seeds = range(self.samples if temperature else 1)
        parts = [counts_of(self.decode(rule, temperature, self.prompts, s, **options), cache) for s in seeds]
        names = Counts.__dataclass_fields__
        return Counts(**{name: np.sum([getattr(part, name) for part in parts], axis=0) for name in names})

    def calls(self, rule: Rule, temperature: float) -> float:
        """Verifier calls per emitted token on the pilot."""
        counts = [row["counts"] for row in self.decode(rule, temperature, self.pilot)]
        return sum(one["verifier_calls"] for one in counts) / sum(one["emitted"] for one in counts)


def rule_of(name: str, table: RejectedPairs, head: DeferralHead) -> Rule:
    """A method at any value of its dial."""
    if name == HEAD:
        return learned_rule(head, 0.1)
    loosest = {"fly": {"window": 1}}  # as published, with 6, it waits for longer drafts than these
    return CSD(table=table, least=2) if name == "csd" else make_rule(name, **loosest.get(name, {}))


def undefined(rule: Rule, temperature: float) -> str | None:
    """Why a method has no cell: greedy, its authors' formula gives the verifier's token whatever its dial."""
    if temperature == 0 and isinstance(rule, LawRule) and rule.lossless_when_greedy:
        return "lossless at temperature 0"
    return None


def dials_around(
    bench: Bench, rule: Rule, tried: Sequence[float], temperature: float, wished: float
) -> list[Rule]:
    """Settings whose calls per token on the pilot lie around those wished for; the nearest end where none reaches them.

    Args:
        tried: dials that are decoded on the pilot, then others between them.
    """
    calls: dict[float, float] = {}
    dials = [float(value) for value in tried]
    for _ in range(REFINED + 1):
        calls |= {
            value: bench.calls(rule.with_dial(value), temperature) for value in dials if value not in calls
        }
        known = sorted((count, value) for value, count in calls.items())
        around = np.clip(np.array(SPREAD) * wished, known[0][0], known[-1][0])
        found = np.interp(around, [count for count, _ in known], [value for _, value in known])
        dials = [float(value) for value in dict.fromkeys(found)]
    return [rule.with_dial(value) for value in dials]


def swept(rule: Rule) -> list[float]:
    """Dials over the range where a rule's decisions change."""
    assert rule.dial is not None
    return rule.dial.swept(TRIED)


def greedy_counts(
    bench: Bench, methods: Mapping[str, Rule], labels: Traces, latest: Traces, head: Path, share: float
) -> dict[str, list[Counts]]:
    """Counts of every setting of every method at temperature 0, lossless among them."""
    groups: dict[str, dict[str, Rule]] = {LOSSLESS: {LOSSLESS: make_rule(LOSSLESS)}}
    for name, rule in methods.items():
        if name == HEAD:
            groups[name] = head_settings(head, latest, HEAD)
        elif not isinstance(rule, BlockRule):
            source: Any = rule if name == "csd" else name
            groups[name] = settings_of(source, labels)
    every = {label: rule for rules in groups.values() for label, rule in rules.items()}
    lines: dict[str, Lines] = {label: [] for label in every}
    for row in decode_tree(bench.pair, bench.prompts, every, DRAFTED, NEW_TOKENS):
        lines[row.rule].append(row.as_line())
    cache: dict[Any, Any] = {}
    found = {name: [counts_of(lines[label], cache) for label in rules] for name, rules in groups.items()}
    wished = share * bench.calls(make_rule(LOSSLESS), 0.0)
    for name, rule in methods.items():
        if isinstance(rule, BlockRule):
            settings = dials_around(bench, rule, swept(rule), 0.0, wished)
            found[name] = [bench.counts(one, 0.0, cache) for one in settings]
    return found


def sampled_counts(
    bench: Bench, methods: Mapping[str, Rule], alphas: Sequence[float], share: float
) -> dict[str, list[Counts]]:
    """Counts of settings around the wished calls at temperature 1, lossless among them.

    Args:
        alphas: that are tried for the head.
    """
    cache: dict[Any, Any] = {}
    lossless = make_rule(LOSSLESS)
    wished = share * bench.calls(lossless, 1.0)
    found = {LOSSLESS: [bench.counts(lossless, 1.0, cache)]}
    for name, rule in methods.items():
        settings = dials_around(bench, rule, alphas if name == HEAD else swept(rule), 1.0, wished)
        found[name] = [bench.counts(one, 1.0, cache) for one in settings]
        print(f"  {name}: {', '.join(f'{one.dial_value:g}' for one in settings)}", flush=True)
    return found


def cells(found: Mapping[str, list[Counts]], share: float, weights: np.ndarray) -> dict[str, Any]:
    """Scores of every method at a share of lossless's calls, and less the head's, with intervals."""
    known = {name: [redrawn(one, weights) for one in settings] for name, settings in found.items()}
    lossless = known[LOSSLESS][0]
    calls = share * lossless["calls"]
    at = {
        name: {score: at_calls(settings, score, calls) for score in (*SCORES, "words")}
        for name, settings in known.items()
        if name != LOSSLESS
    }
    rows: dict[str, Any] = {LOSSLESS: {score: float(lossless[score][0]) for score in (*SCORES, "calls")}}
    for name, scores in at.items():
        fewest = min(float(one["calls"][0]) for one in known[name]) / float(lossless["calls"][0])
        row: dict[str, Any] = {
            "fewest_calls": fewest,
            "length": float((scores["words"] / lossless["words"])[0]),
        }
        for score in SCORES:
            less = scores[score] - at[HEAD][score]
            low, high = np.nanquantile(less[1:], [0.025, 0.975]) if np.isfinite(less[0]) else (np.nan, np.nan)
            row[score] = {"value": scores[score][0], "less_head": less[0], "low": low, "high": high}
        rows[name] = row
    return rows


def block_verification(bench: Bench, weights: np.ndarray) -> dict[str, Any]:
    """Tokens per call of block over token-wise verification at temperature 1, and what happens to scores."""
    cache: dict[Any, Any] = {}
    rows = {}
    for name, parameters in TOGETHER.items():
        rule = make_rule(name, **parameters)
        for bonus in ("exact", "verifier"):
            if name == LOSSLESS and bonus == "exact":
                continue  # its bonus is the verifier's
            each, together = (
                redrawn(bench.counts(rule, 1.0, cache, bonus=bonus, verification=way), weights)
                for way in ("token", "block")
            )
            gain = each["calls"] / together["calls"] - 1
            low, high = np.quantile(gain[1:], [0.025, 0.975])
            row: dict[str, Any] = {
                "tokens_per_call": 1 / each["calls"][0],
                "gain": gain[0],
                "low": low,
                "high": high,
            }
            for score in SCORES:
                less = together[score] - each[score]
                row[score] = dict(
                    zip(("value", "low", "high"), (less[0], *np.quantile(less[1:], [0.025, 0.975])))
                )
            rows[f"{name}, bonus {bonus}"] = row
    return rows


def table(rows: Mapping[str, Any], temperature: float, share: float) -> str:
    """Text table of one temperature."""
    first = rows[LOSSLESS]
    lines = [
        f"temperature {temperature:g}, at {share:.2f} of lossless's {first['calls']:.3f} calls a token; lossless "
        + ", ".join(f"{score} {first[score]:.2f}" for score in SCORES),
        f"{'method':<16}{'bleu':>7}  less head [95%]       {'chrf':>7}  less head [95%]       length  fewest calls",
    ]
    for name, row in rows.items():
        if name == LOSSLESS:
            continue
        if "undefined" in row:
            lines.append(f"{name:<16}{row['undefined']}")
            continue
        parts = [
            f"{one['value']:7.2f} {one['less_head']:+6.2f} [{one['low']:+6.2f}, {one['high']:+6.2f}]"
            for one in (row["bleu"], row["chrf"])
        ]
        lines.append(f"{name:<16}{'  '.join(parts)}  {row['length']:6.3f}  {row['fewest_calls']:6.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = study_flags(__doc__, "runs/methods")
    parser.add_argument("--pair", default="en-fr", choices=("en-fr", "en-de"))
    parser.add_argument("--rounds", type=Path, required=True, help="folder of deferral-train rounds")
    parser.add_argument("--head", type=Path, help="another head of it; default the chosen one")
    parser.add_argument("--limit", type=int, default=300, help="validation lines of the table")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=sorted(RULES))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0], choices=[0.0, 1.0])
    parser.add_argument("--share", type=float, default=0.7, help="of lossless's calls per token")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--redraws", type=int, default=1000)
    options = parser.parse_args()
    traces = sorted((options.rounds / "traces").iterdir())
    labels, latest = open_traces(traces[0]), open_traces(traces[-1])
    folder = options.head or options.rounds / "head"
    models = options.shared / "models" / f"multi30k-{options.pair}"
    pair = load_pair(str(models / "drafter"), str(models / "verifier"), options.device)
    lines = prompts_of(options.shared, options.pair, "val", None)
    bench = Bench(pair, lines[: options.limit], lines[-PILOT:], options.samples)
    head, pairs = DeferralHead.from_pretrained(folder), count_rejections([labels])
    weights = np.vstack(
        [np.ones(len(bench.prompts)), PromptBootstrap(len(bench.prompts), options.redraws).weights]
    )
    results: dict[str, Any] = {}
    for temperature in options.temperatures:
        methods = {name: rule_of(name, pairs, head) for name in (*options.methods, HEAD)}
        reasons = {name: undefined(rule, temperature) for name, rule in methods.items()}
        defined = {name: rule for name, rule in methods.items() if reasons[name] is None}
        if temperature == 0:
            found = greedy_counts(bench, defined, labels, latest, folder, options.share)
        else:
            alphas = quantiles_of_estimates(latest, head, KEPT)
            found = sampled_counts(bench, defined, alphas, options.share)
        rows = cells(found, options.share, weights)
        rows |= {name: {"undefined": reason} for name, reason in reasons.items() if reason is not None}
        results[f"temperature {temperature:g}"] = rows
        print(table(rows, temperature, options.share), flush=True)
    if 1.0 in options.temperatures:
        results["block verification"] = block_verification(bench, weights)
        for name, row in results["block verification"].items():
            print(
                f"block verification, {name}: {row['gain']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}] tokens a call "
                f"over {row['tokens_per_call']:.3f}; chrf {row['chrf']['value']:+.2f} "
                f"[{row['chrf']['low']:+.2f}, {row['chrf']['high']:+.2f}]",
                flush=True,
            )
    if options.out:
        record = {
            "study": "methods", "pair": options.pair, "count": len(bench.prompts), "samples": options.samples,
            "share": options.share, "drafted": DRAFTED, "grid": GRID, "head": head.metadata, "results": results,
            "provenance": provenance.collect({"seed": 0}),
        }  # fmt: skip
        provenance.write_json(options.out, finite(provenance.plain(record)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
