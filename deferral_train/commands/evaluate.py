"""`deferral-train evaluate`: score rules and heads from traces alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deferral_train.traces import Traces

RULES = ["opt", "chow", "diff", "token_v3"]


def run(
    traces: list[str] = [],  # noqa: B006 - read only
    rules: list[str] = RULES,
    out: str = "runs/evaluation",
    loss: str = "zero_one",
    truth: str = "reference",
    grid: int = 40,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    temperature: float | None = None,
    num_draft_tokens: int = 5,
    drafter_seconds: float | None = None,
    verifier_seconds: float | None = None,
    decode: str | None = None,
    metric: str = "bleu",
    baseline: str = "opt",
    figures: bool = True,
    prefixes: int = 20,
    breakdown: list[str] = [],  # noqa: B006
    prompts: list[str] = [],  # noqa: B006
    tokenizer: list[str] = [],  # noqa: B006
    domain: str = "folder",
    decoded: list[str] = [],  # noqa: B006
    prompt_format: str | None = None,
    prompt_field: str | None = None,
    split: str = "train",
) -> int:
    """Risk, deferral, rejection, acceptance length and predicted latency of any rules over their dials.

    Writes scores.json, scores.csv, the curves as png and svg, prefixes.json for the report's slider, and with
    ``decode`` skew.json, predicted against counted on the same prompts, and frontier.json with its figures:
    quality against deferrals, rejections and latency, speed-up at the verifier's quality, best quality
    within its latency. With ``breakdown`` also breakdowns.json and breakdowns.csv; then traces may be of several
    pairs, whose rules are not scored together.

    Args:
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
        temperature: of the sampling laws: 0, 1, or the one that the traces were made for (default).
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
    from deferral_train import provenance
    from deferral_train.errors import InputError
    from deferral_train.evaluation import score_rules
    from deferral_train.evaluation.breakdowns import check_names, make_breakdowns, read_part
    from deferral_train.pairs.load import load_tokenizer
    from deferral_train.traces import open_traces

    if (drafter_seconds is None) != (verifier_seconds is None):
        raise InputError("give both drafter_seconds and verifier_seconds, or neither")
    costs = None
    if drafter_seconds is not None and verifier_seconds is not None:
        costs = {"drafter": drafter_seconds, "verifier": verifier_seconds}
    check_names(
        breakdown,
        traces=bool(traces),
        prompts=bool(prompts),
        tokenizer=bool(tokenizer),
        decoded=bool(decoded),
    )
    if not traces and not breakdown:
        raise InputError("traces is empty; give trace folders of a pair")
    opened = [open_traces(place) for place in traces]
    folder = Path(out)
    if loss == "sequence":
        from deferral_train.evaluation.sequence_scores import score_sequences, write_pairs

        scored = score_sequences(
            opened, rules, grid=grid, bootstrap=bootstrap, seed=seed, confidence=confidence
        )
        print(f"{scored.text()}\n\n{scored.write(folder)}")
        for name in tokenizer[:1]:
            print(f"\n{write_pairs(opened, rules, load_tokenizer(name), folder)}")
        return 0
    tables = None
    if breakdown:
        files = _one_each(prompts, traces)
        tokenizers = [load_tokenizer(place) for place in tokenizer]
        parts = [
            read_part(
                part,
                name,
                file,
                tokenizers,
                domain,
                format=prompt_format,
                prompt_field=prompt_field,
                split=split,
            )
            for part, name, file in zip(opened, _names(traces), files)
        ]
        tables = make_breakdowns(
            parts, breakdown, rules, decode_folders=decoded, num_draft_tokens=num_draft_tokens,
            temperature=temperature, bootstrap=bootstrap, seed=seed, confidence=confidence,
        )  # fmt: skip
        apart = _apart(opened)
        if apart is not None:
            tables.write(folder)
            print(f"{tables.text()}\n\n{apart}; {folder / 'breakdowns.json'}")
            return 0
    table = score_rules(
        opened,
        rules,
        prefixes=prefixes,
        loss=loss,
        truth=truth,
        grid=grid,
        bootstrap=bootstrap,
        seed=seed,
        confidence=confidence,
        temperature=temperature,
        num_draft_tokens=num_draft_tokens,
        costs=costs,
    )
    if tables is not None:
        tables.write(folder)
    table.to_json(folder / "scores.json", baseline)
    table.to_csv(folder / "scores.csv")
    provenance.write_json(folder / "prefixes.json", table.prefixes)
    if figures:
        table.figures(folder)
    if decode is not None:
        rows = compare_with_decode(
            opened, rules, Path(decode), temperature, num_draft_tokens, bootstrap, seed
        )
        provenance.write_json(folder / "skew.json", rows)
        write_frontier(Path(decode), folder, metric)
    print(table.text(baseline))
    if tables is not None:
        print(f"\n{tables.text()}")
    print(f"\n{folder / 'scores.json'}")
    return 0


def _one_each(prompts: Sequence[str], traces: Sequence[str]) -> list[str | None]:
    """The prompts file of each trace folder."""
    from deferral_train.errors import InputError

    if len(prompts) not in (0, 1, len(traces)):
        raise InputError(
            f"prompts names {len(prompts)} files for {len(traces)} trace folders; one for each, or one for all"
        )
    return list(prompts) if len(prompts) == len(traces) else [*prompts, None][:1] * len(traces)


def _names(traces: Sequence[str]) -> list[str]:
    """A name per folder: its last part, or as much of its end as tells it from the others."""
    places = [Path(folder).resolve().parts for folder in traces]
    most = max(map(len, places), default=1)
    for length in range(1, most + 1):
        names = ["/".join(parts[-length:]) for parts in places]
        if len(set(names)) == len(names):
            break
    return names if traces else []


def _apart(opened: Sequence[Traces]) -> str | None:
    """Why the rules cannot be scored on these traces together; None where they can."""
    from deferral_train.errors import InputError
    from deferral_train.evaluation.positions import check_same

    if not opened:
        return "no rules were scored: no traces"
    try:
        check_same(opened)
    except InputError as error:
        return f"no rules were scored: {error}"
    return None


def compare_with_decode(
    traces: Sequence[Traces],
    specs: Sequence[str],
    decode: Path,
    temperature: float | None,
    num_draft_tokens: int,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Predicted against counted for every spec at a fixed dial value that was decoded under its label."""
    from deferral_train.decoding.decode import rule_label
    from deferral_train.decoding.outputs import OUTPUTS, read_lines
    from deferral_train.errors import InputError
    from deferral_train.evaluation import skew
    from deferral_train.heads.rules import rule_from_spec

    outputs = list(read_lines(decode / OUTPUTS))
    labels = {row["rule"] for row in outputs}
    known = [rule_from_spec(spec, typed=specs) for spec in [*specs, "lossless"]]
    rules = {rule_label(rule): rule for rule in known}
    shared = {label: rule for label, rule in rules.items() if label in labels}
    if not shared:
        raise InputError(
            f"decode={decode} holds {', '.join(sorted(labels)) or 'no outputs'}, none of the rules "
            f"{', '.join(rules)}; name the decoded rules with their dial, e.g. opt:alpha=0.2"
        )
    rows = []
    for part in traces:
        for label, rule in shared.items():
            rows += skew.compare(
                part,
                label,
                rule,
                outputs,
                temperature=temperature,
                num_draft_tokens=num_draft_tokens,
                bootstrap=bootstrap,
                seed=seed,
            )
    return skew.table_of(rows)


def write_frontier(decode: Path, out: Path, metric: str) -> None:
    """Quality against cost of the decoded settings, where the verifier alone and references are among
    them.
    """
    import json

    from deferral_train.decoding.outputs import BATCHES, read_lines
    from deferral_train.evaluation import frontier

    path = decode / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rules": {}}
    if frontier.VERIFIER not in summary["rules"] or not summary["rules"][frontier.VERIFIER]["quality"]:
        return
    entry = frontier.frontier_of(summary, metric, list(read_lines(decode / BATCHES)))
    frontier.write_frontier([entry], out)
