"""`deferral-train evaluate`: score rules and heads from traces alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deferral_train import provenance
from deferral_train.decoding.settings import Settings
from deferral_train.errors import InputError

if TYPE_CHECKING:
    from deferral_train.evaluation.breakdowns import Breakdowns
    from deferral_train.evaluation.table import ScoreTable
    from deferral_train.traces import Traces


@dataclass(frozen=True)
class EvaluateConfig:
    """Risk, deferral, rejection, acceptance length and predicted latency of any rules over their dials.

    Writes scores.json, scores.csv, the curves as png and svg, prefixes.json for the report's slider, and with
    ``decode`` skew.json, predicted against counted on the same prompts, and frontier.json with its figures:
    quality against deferrals, rejections and latency, speed-up at the verifier's quality, best quality
    within its latency. With ``breakdown`` also breakdowns.json and breakdowns.csv; then traces may be of several
    pairs, whose rules are not scored together.

    Attributes:
        traces: trace folders of one pair; for breakdowns of any pairs.
        rules: names or specs: opt, learned:head=FOLDER, my_pkg.mine:MyRule; opt:alpha=0.2 marks that point.
        out: folder for the results; runs/NAME/evaluation is where `report` looks.
        loss: zero_one, log or prob of the next token; or sequence, of the finished text: for traces with sequence
            labels, writes sequence_scores.json (what the places lose that a rule keeps) and, with tokenizer,
            token_pairs.json (what heads hold most harmless and most harmful), and nothing else.
        truth: reference, verifier, teacher or exact.
        grid: dial points of each rule.
        bootstrap: redraws of prompts for the intervals, 0 for none.
        seed: of the redraws.
        confidence: of the intervals.
        temperature: of the sampling distributions: 0, 1, or the one that the traces were made for (default).
        num_draft_tokens: drafted tokens in a block.
        drafter_seconds: measured seconds of one drafter step, for the predicted latency.
        verifier_seconds: measured seconds of one verifying pass.
        decode: folder of a `decode` run on the same prompts, to compare predictions with counts.
        metric: of the summary of ``decode``, for quality against latency and the paper's Table 2
            (frontier.json).
        baseline: rule that the others are compared to.
        figures: draw the curves.
        prefixes: prompts kept for the report's alpha slider.
        breakdown: acceptance and deferral (of lossless, and of rules at a spelled-out dial) by position (place in the
            block), copy_rate (share of the text that occurs in its prompt), domain or architecture (pair of models);
            max_gram: its failures by class of input; drafting: decode runs side by side.
        prompts: files that the traces were collected from, one for each folder or one for all, for copy_rate,
            max_gram and a domain that is a field.
        tokenizer: checkpoints with the tokenizers of the traces, for copy_rate, max_gram and loss sequence.
        domain: folder (of the traces), id (the part of a prompt's id before the first of / # :) or a field of the
            prompts.
        decoded: folders of `decode` runs, for the breakdown drafting.
        prompt_format: of prompts: jsonl, csv, tsv, parquet, text, mmlu or dataset; default by suffix.
        prompt_field: field or column of the prompt.
        split: split of a data set.

    """

    traces: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=lambda: ["opt", "chow", "diff", "token_v3"])
    out: str = "runs/evaluation"
    loss: str = "zero_one"
    truth: str = "reference"
    grid: int = 40
    bootstrap: int = 1000
    seed: int = 0
    confidence: float = 0.95
    temperature: float | None = None
    num_draft_tokens: int = Settings.num_draft_tokens
    drafter_seconds: float | None = None
    verifier_seconds: float | None = None
    decode: str | None = None
    metric: str = "bleu"
    baseline: str = "opt"
    figures: bool = True
    prefixes: int = 20
    breakdown: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    tokenizer: list[str] = field(default_factory=list)
    domain: str = "folder"
    decoded: list[str] = field(default_factory=list)
    prompt_format: str | None = None
    prompt_field: str | None = None
    split: str = "train"

    @property
    def costs(self) -> dict[str, float] | None:
        """Measured seconds of the two models' passes; None where they were not given."""
        if (self.drafter_seconds is None) != (self.verifier_seconds is None):
            raise InputError("give both drafter_seconds and verifier_seconds, or neither")
        if self.drafter_seconds is None or self.verifier_seconds is None:
            return None
        return {"drafter": self.drafter_seconds, "verifier": self.verifier_seconds}


# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = EvaluateConfig


def run(config: EvaluateConfig) -> int:
    """Score the rules, and make the breakdowns and the comparison with decoding that were asked for."""
    from deferral_train.evaluation.breakdowns import check_names
    from deferral_train.traces import open_traces

    costs = config.costs
    check_names(
        config.breakdown,
        traces=bool(config.traces),
        prompts=bool(config.prompts),
        tokenizer=bool(config.tokenizer),
        decoded=bool(config.decoded),
    )
    if not config.traces and not config.breakdown:
        raise InputError("traces is empty; give trace folders of a pair")
    opened = [open_traces(folder) for folder in config.traces]
    with provenance.one_writer(config.out, "evaluate"):
        return _evaluate(config, opened, costs, Path(config.out))


def _evaluate(
    config: EvaluateConfig, opened: Sequence[Traces], costs: dict[str, float] | None, folder: Path
) -> int:
    """Everything that is written to ``folder``."""
    if config.loss == "sequence":
        return _score_sequences(config, opened, folder)
    breakdowns = _break_down(config, opened) if config.breakdown else None
    if breakdowns is not None and (reason := _apart(opened)) is not None:
        breakdowns.write(folder)
        print(f"{breakdowns.text()}\n\n{reason}; {folder / 'breakdowns.json'}")
        return 0
    table = _score(config, opened, costs)
    if breakdowns is not None:
        breakdowns.write(folder)
    if config.decode is not None:
        provenance.write_json(folder / "skew.json", _compare_with_decode(config, opened, Path(config.decode)))
        _write_frontier(Path(config.decode), folder, config.metric)
    print(table.text(config.baseline))
    if breakdowns is not None:
        print(f"\n{breakdowns.text()}")
    print(f"\n{folder / 'scores.json'}")
    return 0


def _score_sequences(config: EvaluateConfig, opened: Sequence[Traces], folder: Path) -> int:
    """Score the rules by sequence labels; with a tokenizer also what heads hold of pairs of tokens."""
    from deferral_train.evaluation.sequence_scores import score_sequences, write_pairs
    from deferral_train.pairs.load import load_tokenizer

    scored = score_sequences(
        opened,
        config.rules,
        grid=config.grid,
        bootstrap=config.bootstrap,
        seed=config.seed,
        confidence=config.confidence,
    )
    print(f"{scored.text()}\n\n{scored.write(folder)}")
    for name in config.tokenizer[:1]:
        print(f"\n{write_pairs(opened, config.rules, load_tokenizer(name), folder)}")
    return 0


def _score(config: EvaluateConfig, opened: Sequence[Traces], costs: dict[str, float] | None) -> ScoreTable:
    """Score the rules and write their table, curves and the slider's prefixes."""
    from deferral_train.evaluation import score_rules
    from deferral_train.evaluation.figures import draw_scores

    table = score_rules(
        opened,
        config.rules,
        prefixes=config.prefixes,
        loss=config.loss,
        truth=config.truth,
        grid=config.grid,
        bootstrap=config.bootstrap,
        seed=config.seed,
        confidence=config.confidence,
        temperature=config.temperature,
        num_draft_tokens=config.num_draft_tokens,
        costs=costs,
    )
    folder = Path(config.out)
    table.to_json(folder / "scores.json", config.baseline)
    table.to_csv(folder / "scores.csv")
    provenance.write_json(folder / "prefixes.json", table.prefixes)
    if config.figures:
        draw_scores(table, folder)
    return table


def _break_down(config: EvaluateConfig, opened: Sequence[Traces]) -> Breakdowns:
    from deferral_train.evaluation.bootstrap import Redraws
    from deferral_train.evaluation.breakdowns import make_breakdowns, read_part
    from deferral_train.pairs.load import load_tokenizer

    files = _one_each(config.prompts, config.traces)
    tokenizers = [load_tokenizer(folder) for folder in config.tokenizer]
    parts = [
        read_part(
            part,
            name,
            file,
            tokenizers,
            config.domain,
            format=config.prompt_format,
            prompt_field=config.prompt_field,
            split=config.split,
        )
        for part, name, file in zip(opened, _names(config.traces), files)
    ]
    return make_breakdowns(
        parts,
        config.breakdown,
        config.rules,
        decode_folders=config.decoded,
        num_draft_tokens=config.num_draft_tokens,
        temperature=config.temperature,
        redraws=Redraws(config.bootstrap, config.seed, config.confidence),
    )


def _one_each(prompts: Sequence[str], traces: Sequence[str]) -> list[str | None]:
    """The prompts file of each trace folder."""
    if len(prompts) not in (0, 1, len(traces)):
        raise InputError(
            f"prompts names {len(prompts)} files for {len(traces)} trace folders; one for each, or one for all"
        )
    return list(prompts) if len(prompts) == len(traces) else [*prompts, None][:1] * len(traces)


def _names(traces: Sequence[str]) -> list[str]:
    """A name per folder: its last part, or as much of its end as tells it from the others."""
    paths = [Path(folder).resolve().parts for folder in traces]
    most = max(map(len, paths), default=1)
    for length in range(1, most + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names if traces else []


def _apart(opened: Sequence[Traces]) -> str | None:
    """Why the rules cannot be scored on these traces together; None where they can."""
    from deferral_train.evaluation.positions import check_same

    if not opened:
        return "no rules were scored: no traces"
    try:
        check_same(opened)
    except InputError as error:
        return f"no rules were scored: {error}"
    return None


def _compare_with_decode(config: EvaluateConfig, traces: Sequence[Traces], decode: Path) -> dict[str, Any]:
    """Predicted against counted for every spec at a fixed dial value that was decoded under its label."""
    from deferral_train.decoding.decode import rule_label
    from deferral_train.decoding.outputs import OUTPUTS, read_lines
    from deferral_train.evaluation import skew
    from deferral_train.heads.rules import rule_from_spec

    outputs = list(read_lines(decode / OUTPUTS))
    labels = {row["rule"] for row in outputs}
    known = [rule_from_spec(spec, typed=config.rules) for spec in [*config.rules, "lossless"]]
    rules = {rule_label(rule): rule for rule in known}
    shared = {label: rule for label, rule in rules.items() if label in labels}
    if not shared:
        raise InputError(
            f"decode={decode} holds {', '.join(sorted(labels)) or 'no outputs'}, none of the rules "
            f"{', '.join(rules)}; name the decoded rules with their dial, e.g. opt:alpha=0.2"
        )
    options = {
        name: getattr(config, name) for name in ("temperature", "num_draft_tokens", "bootstrap", "seed")
    }
    rows = [
        row
        for part in traces
        for label, rule in shared.items()
        for row in skew.compare(part, label, rule, outputs, **options)
    ]
    return skew.table_of(rows)


def _write_frontier(decode: Path, out: Path, metric: str) -> None:
    """Quality against cost of the decoded settings, where the verifier alone and references are among them."""
    from deferral_train.decoding.outputs import BATCHES, SUMMARY, read_lines, read_record
    from deferral_train.evaluation import frontier
    from deferral_train.evaluation.figures import draw_frontier

    summary = read_record(decode / SUMMARY) or {"rules": {}}
    if frontier.VERIFIER not in summary["rules"] or not summary["rules"][frontier.VERIFIER]["quality"]:
        return
    entry = frontier.frontier_of(summary, metric, list(read_lines(decode / BATCHES)))
    frontier.write_frontier([entry], out)
    draw_frontier(entry, out / "frontier")
