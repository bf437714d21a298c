"""The stages that decode: rules at their operating points, whole rules over their dials, and what the cascade's own
prefixes predict of it.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from deferral_train import provenance
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.settings import VLLM, DecodeConfig
from deferral_train.evaluation import skew
from deferral_train.evaluation.evidence import read_evidence
from deferral_train.evaluation.expectation import expectation
from deferral_train.evaluation.outputs import check_metrics, score_outputs
from deferral_train.evaluation.specdec_bench import write_specdec_bench
from deferral_train.heads import DeferralHead
from deferral_train.heads.export import set_operating_point
from deferral_train.heads.rules import learned_rule, rule_from_spec
from deferral_train.pipeline import ask
from deferral_train.pipeline.constraint import FOLDER as CALIBRATION
from deferral_train.pipeline.constraint import CertificateSearch, certified_point
from deferral_train.pipeline.context import Results, RunContext
from deferral_train.pipeline.frontier import ALWAYS, decode_frontier
from deferral_train.pipeline.heads import BEST, LEARNED
from deferral_train.pipeline.print_summary import short
from deferral_train.pipeline.text import read_part
from deferral_train.redaction import redacted_text
from deferral_train.rules.base import Rule
from deferral_train.traces import open_traces

ON_POLICY = "traces/on_policy"
TIMING, SHAPES = "timing", "shapes"
DRAFTER = "drafter_only"
ENDS = ("verifier_only", "lossless", DRAFTER)
TIMES = ("tokens_per_second", "ms_per_token", "tokens_per_second_each", "seconds")


def decode_rules(run: RunContext, results: Results) -> Any:
    """Verifier alone, lossless and the rules at their operating points, on the test prompts.

    With ``decode.timed`` so many of them are decoded again one by one, and the summary takes its times from there.
    """
    section = run.config.decode
    rules = {name: rule_from_spec(name) for name in ENDS if name != DRAFTER or run.asks}
    typed = run.config.rules
    rules |= {label: rule_from_spec(spec, typed) for label, spec in run.decoded(results).items()}
    decoder = run.decoder(results["pair"])
    prompts = read_part(run.folder, "test", section.limit)
    metrics = (*section.metrics, *([] if run.metric in (*ALWAYS, *section.metrics) else [run.metric]))
    check_metrics(metrics, prompts)
    once, how = 1 if section.timed else section.repetitions, section.settings(run.config.seed)
    settings = DecodeConfig(how, once, log_tokens=0 if section.timed else 5)
    summary = decoder.decode(prompts, rules, settings, run.folder / "decode")
    if section.timed:
        alone = DecodeConfig(replace(how, batch_size=1), section.repetitions, log_tokens=5)
        timed = decoder.decode(prompts[: section.timed], rules, alone, run.folder / TIMING)
        for label, rule in summary["rules"].items():
            rule |= {name: timed["rules"][label][name] for name in TIMES}
        provenance.write_json(run.folder / "decode" / "summary.json", summary)
    if metrics:
        summary = score_outputs(run.folder / "decode", metrics, decoder.scoring(metrics), prompts)
    write_specdec_bench(
        run.folder / "decode", summary, *(results["pair"][role] for role in ("drafter", "verifier"))
    )
    return {name: short(scores, run.metric) for name, scores in summary["rules"].items()}


def decode_shapes(run: RunContext, results: Results) -> Any:
    """Share of right answers to questions of families that no part has: verifier alone and the chosen setting."""
    chosen = run.chosen(results)
    rules = {"verifier_only": rule_from_spec("verifier_only")}
    rules[chosen["label"]] = rule_from_spec(chosen["spec"], run.config.rules)
    decoder = run.decoder(results["pair"])
    prompts = read_part(run.folder, ask.SHAPES)
    decoder.decode(
        prompts, rules, DecodeConfig(run.config.decode.settings(run.config.seed)), run.folder / SHAPES
    )
    summary = score_outputs(run.folder / SHAPES, (run.metric,), decoder.scoring((run.metric,)), prompts)
    right = {name: rule["quality"][redacted_text(run.metric)] for name, rule in summary["rules"].items()}
    return {"questions": len(prompts), "right": right}


def certify_constraint(run: RunContext, results: Results, plug_in: str) -> dict[str, Any]:
    """The setting that `choose` certifies on the calibration part; the exported head stores one of its own.

    Where no setting is certified, ``name`` is None and ``reason`` says what came nearest.
    """
    typed, head = run.config.rules, run.folder / "head"
    rules: dict[str, tuple[str, Rule | str]] = {
        plug_in: (plug_in, rule_from_spec(plug_in, typed)),
        LEARNED: (f"learned:head={head}", learned_rule(DeferralHead.from_pretrained(head), alpha=0.0)),
    }
    found = certified_point(
        CertificateSearch(
            run.config.point, run.config.decode, run.metric, run.folder / CALIBRATION, run.config.seed
        ),
        run.decoder(results["pair"]),
        read_part(run.folder, "calibration"),
        run.open("validation"),
        rules,
    )
    if found["name"] == LEARNED:
        evidence = read_evidence(run.folder / CALIBRATION)
        expected = expectation(evidence, found["label"], run.metric)
        set_operating_point(head, found["value"], found["certificate"], expected)
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
        run.decoder(results["pair"]),
        read_part(run.folder, "test", config.limit),
        run.open("calibration"),
        rules,
        run.folder,
        run.config.seed,
    )


def compare_skew(run: RunContext, results: Results) -> Any:
    """Collect on the chosen cascade's own prefixes and compare what they predict with what decoding counted."""
    chosen, section = run.chosen(results), run.config.decode
    decoded = {
        "prefixes": "cascade",
        "temperature": section.temperature,
        "max_new_tokens": section.max_new_tokens,
        "num_draft_tokens": section.num_draft_tokens,
    }
    settings = CollectConfig(
        **run.collecting(results["pair"], "test"),
        **asdict(run.config.traces) | decoded,
        rule=chosen["spec"],
        blocks="served" if run.config.engine == VLLM else "tight",
        limit=section.limit if run.config.on_policy is None else min(run.config.on_policy, section.limit),
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
