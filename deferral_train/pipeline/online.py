"""The stages that decode: rules at their operating points, whole rules over their dials, and what the cascade's own
prefixes predict of it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deferral_train import provenance
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding import Pair
from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.pair import Settings
from deferral_train.evaluation import skew
from deferral_train.evaluation.outputs import check_metrics, score_outputs
from deferral_train.heads import DeferralHead
from deferral_train.heads.artifact import set_operating_point
from deferral_train.heads.rules import learned_rule, rule_from_spec
from deferral_train.pipeline.closing import short
from deferral_train.pipeline.context import Results, RunContext
from deferral_train.pipeline.frontier import decode_frontier
from deferral_train.pipeline.heads import BEST, LEARNED
from deferral_train.pipeline.pair import open_pair
from deferral_train.pipeline.text import read_part
from deferral_train.pipeline.wish import certified_point
from deferral_train.rules.base import Rule
from deferral_train.traces import open_traces

ON_POLICY = "traces/on_policy"


def decode_rules(run: RunContext, results: Results) -> Any:
    """Verifier alone, lossless and the rules at their operating points, on the test prompts."""
    section = asdict(run.config.decode)
    limit, repetitions, metrics = (section.pop(name) for name in ("limit", "repetitions", "metrics"))
    rules = {name: rule_from_spec(name) for name in ("verifier_only", "lossless")}
    typed = run.config.rules
    rules |= {label: rule_from_spec(spec, typed) for label, spec in run.decoded(results).items()}
    settings = DecodeConfig(Settings(seed=run.config.seed, **section), repetitions, log_tokens=5)
    pair = Pair(open_pair(run.config.pair, results["pair"]))
    prompts = read_part(run.folder, "test", limit)
    check_metrics(metrics, prompts)
    summary = decode(pair, prompts, rules, settings, run.folder / "decode")
    if metrics:
        summary = score_outputs(run.folder / "decode", metrics, pair.models, prompts)
    return {name: short(scores) for name, scores in summary["rules"].items()}


def certify_wish(run: RunContext, results: Results, plug_in: str) -> dict[str, Any]:
    """The setting that `choose` certifies on the calibration part; the exported head stores one of its own."""
    typed, head = run.config.rules, run.folder / "head"
    rules: dict[str, tuple[str, Rule | str]] = {
        plug_in: (plug_in, rule_from_spec(plug_in, typed)),
        LEARNED: (f"learned:head={head}", learned_rule(DeferralHead.from_pretrained(head), alpha=0.0)),
    }
    found = certified_point(
        run.config.point,
        run.config.decode,
        Pair(open_pair(run.config.pair, results["pair"])),
        read_part(run.folder, "calibration"),
        run.open("calibration"),
        rules,
        run.folder,
        run.config.seed,
    )
    if found["name"] == LEARNED:
        set_operating_point(head, found["value"], found["certificate"])
    return found


def decode_frontiers(run: RunContext, results: Results) -> Any:
    """Every rule over its dial, decoded; nothing where no temperature is asked for."""
    config = run.config.frontier
    if not config.temperatures:
        return None
    head = DeferralHead.from_pretrained(run.folder / BEST)
    rules: dict[str, tuple[str, Rule | str]] = {rule: (rule, rule) for rule in config.rules}
    rules[LEARNED] = (f"learned:head={run.folder / 'head'}", learned_rule(head, alpha=0.0))
    return decode_frontier(
        config,
        run.config.decode,
        Pair(open_pair(run.config.pair, results["pair"])),
        read_part(run.folder, "test", config.limit),
        run.open("calibration"),
        rules,
        run.folder,
        run.config.seed,
    )


def compare_skew(run: RunContext, results: Results) -> Any:
    """Collect on the chosen cascade's own prefixes and compare what they predict with what decoding counted."""
    chosen, section = run.chosen(results), run.config.decode
    settings = CollectConfig(
        **run.collecting(results["pair"], "test"),
        **{**asdict(run.config.traces), "prefixes": "cascade", "temperature": section.temperature},
        rule=chosen["spec"],
        limit=section.limit,
        max_new_tokens=section.max_new_tokens,
        num_draft_tokens=section.num_draft_tokens,
    )
    collect(settings, run.folder / ON_POLICY)
    rows = skew.compare(
        open_traces(run.folder / ON_POLICY),
        chosen["label"],
        rule_from_spec(chosen["spec"], typed=run.config.rules),
        read_lines(run.folder / "decode" / OUTPUTS),
        num_draft_tokens=section.num_draft_tokens,
        bootstrap=run.config.bootstrap,
        seed=run.config.seed,
    )
    table = skew.table_of(rows)
    provenance.write_json(run.folder / "evaluation" / "skew.json", table)
    return table["meta"]
