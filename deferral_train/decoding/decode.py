"""``decode``: prompts in, any list of rules side by side; outputs as rows finish, a summary at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deferral_train import provenance
from deferral_train.decoding.compatibility import Consulted, check_consulted, with_counting
from deferral_train.decoding.decoder import Decoder, NotRunError
from deferral_train.decoding.outputs import BATCHES, OutputFolder, read_lines
from deferral_train.decoding.pair import BatchResult
from deferral_train.decoding.reuse import identity
from deferral_train.decoding.settings import DecodeConfig
from deferral_train.decoding.stopping import StopDrafting
from deferral_train.decoding.summary import summarize_rule
from deferral_train.decoding.token_log import TokenLog
from deferral_train.errors import InputError
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule

SILENT = 10.0  # seconds before a bar is shown


@dataclass
class _Contestant:
    label: str
    rule: Rule
    stop: StopDrafting | None
    counters: list[Consulted]
    drafted: int = 0


def decode(
    pair: Decoder,
    prompts: Sequence[Prompt],
    rules: Mapping[str, Rule] | Sequence[Rule | str],
    config: DecodeConfig | None = None,
    out: str | Path = "runs/decode",
    fresh: bool = False,
) -> dict[str, Any]:
    """Decode all prompts with all rules and write ``outputs.jsonl``, ``batches.jsonl`` and ``summary.json``.

    Finished batches survive any interruption; the same call again does the rest and gives the same texts and
    counts.

    Args:
        pair: what decodes.
        rules: rules by label, or a list of rules or names (labelled by name and dial).
        out: folder for the outputs.
        fresh: remove the outputs of another run from it and start over.

    Returns:
        the content of ``summary.json``.

    Raises:
        InputError: bad prompts or settings, a head of another pair, a folder that holds another run, too
            little
            memory (finished outputs stay on the disk).
        RuntimeError: a head was configured but never asked.
    """
    config = config or DecodeConfig()
    named = labelled(rules)
    mismatches = {label: pair.check(rule, config.settings) for label, rule in named.items()}
    encoded = pair.encode(prompts, config.settings)
    given = {prompt.id: prompt for prompt in prompts}
    more = {name: getattr(config, name) for name in ("repetitions", "log_tokens", "sort_by_length")}
    record = identity(pair, prompts, named, config.settings, more)
    with provenance.one_writer(out, "decode"):
        folder = OutputFolder(out, record, fresh)
        contestants = [_Contestant(label, *_counted(rule, config)) for label, rule in named.items()]
        try:
            not_run = _run(pair, encoded, given, contestants, config, folder)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise InputError(
                f"out of memory at batch_size={config.settings.batch_size}; {len(folder.finished)} finished "
                f"batches stay in {folder.folder}; decode again into another folder with a smaller batch_size"
            ) from error
        for contestant in contestants:
            check_consulted(contestant.counters, contestant.drafted)
        ran = {label: rule for label, rule in named.items() if label not in not_run}
        summary = _summary(folder, ran, mismatches, config) | {
            "conditions": pair.facts(config.settings),
            "run": folder.identity,
            "models": pair.sizes(),
        }
        if not_run:
            summary["not_run"] = not_run
        provenance.write_json(folder.folder / "summary.json", summary)
    return summary


def labelled(rules: Mapping[str, Rule] | Sequence[Rule | str]) -> dict[str, Rule]:
    """Rules by label; a label says the name and the dial's value."""
    if isinstance(rules, Mapping):
        named = dict(rules)
    else:
        made = [make_rule(rule) if isinstance(rule, str) else rule for rule in rules]
        named = {rule_label(rule): rule for rule in made}
        if len(named) < len(made):
            raise InputError("rules: the same rule is given twice; name each once")
    if not named:
        raise InputError("rules is empty; give at least one")
    return named


def rule_label(rule: Rule) -> str:
    """For example ``opt:alpha=0.2``."""
    return rule.name if rule.dial is None else f"{rule.name}:{rule.dial.parameter}={rule.dial_value:g}"


def _counted(rule: Rule, config: DecodeConfig) -> tuple[Rule, StopDrafting | None, list[Consulted]]:
    return with_counting(rule, config.settings.stop)


def _dial(rule: Rule) -> dict[str, Any] | None:
    """Where the rule's dial stands: a label of the caller's need not say it."""
    if rule.dial is None:
        return None
    return {"rule": rule.name, "parameter": rule.dial.parameter, "value": rule.dial_value}


def _run(
    pair: Decoder,
    encoded: Sequence[EncodedPrompt],
    given: Mapping[str, Prompt],
    contestants: Sequence[_Contestant],
    config: DecodeConfig,
    folder: OutputFolder,
) -> dict[str, str]:
    """Decode what is not finished, turn by turn; returns the rules that could not be run, with the reason."""
    from tqdm import tqdm  # comes with transformers, which the models are loaded by

    batches = pair.group(encoded, config.settings, config.sort_by_length)
    jobs = [
        (repetition, number, contestant)
        for repetition in range(config.repetitions)
        for number in range(len(batches))
        for contestant in contestants
    ]
    open_jobs = [job for job in jobs if (job[2].label, job[0], job[1]) not in folder.finished]
    not_run: dict[str, str] = {}
    # Large models take minutes, and then it is shown how far this is.
    bar = tqdm(
        total=len(open_jobs), desc="decode", unit="batch", delay=SILENT, mininterval=2.0, dynamic_ncols=True
    )
    with bar:
        for turn in dict.fromkeys(pair.turn(contestant.rule) for contestant in contestants):
            own = [job for job in open_jobs if pair.turn(job[2].rule) == turn]
            members = {job[2].label: job[2] for job in own}
            try:
                if own:
                    _warm_up(pair, batches[0], list(members.values()), config)
            except NotRunError as error:
                not_run |= dict.fromkeys(members, str(error))
                continue
            for repetition, number, contestant in own:
                batch = batches[number]
                log = TokenLog(len(batch), config.log_tokens) if config.log_tokens else None
                stream = repetition * len(batches) + number
                result = pair.decode_batch(
                    batch, contestant.rule, config.settings, contestant.stop, stream, log
                )
                contestant.drafted += int(result.stats.drafted.sum())
                where = {"rule": contestant.label, "repetition": repetition, "batch": number}
                rows = [
                    where | _row(pair, prompt, given[prompt.id], result, index, log)
                    for index, prompt in enumerate(batch)
                ]
                folder.append(rows, where | _batch(result))
                bar.update()
    return not_run


def _warm_up(
    pair: Decoder, batch: Sequence[EncodedPrompt], contestants: Sequence[_Contestant], config: DecodeConfig
) -> None:
    """A short call per rule, so that the first timed batch does not pay for first-time work."""
    settings = replace(config.settings, max_new_tokens=min(8, config.settings.max_new_tokens))
    for contestant in contestants:
        pair.decode_batch(batch[:1], contestant.rule, settings, contestant.stop, 0)


def _row(
    pair: Decoder, prompt: EncodedPrompt, given: Prompt, result: BatchResult, index: int, log: Any
) -> dict[str, Any]:
    tokens, stats = result.tokens[index], result.stats
    row: dict[str, Any] = {
        "id": prompt.id,
        "text": pair.text(tokens),
        "reference": given.reference,
        "tokens": tokens,
        "origin": stats.origin[index, : len(tokens)].tolist(),
        "counts": stats.row(index),
        "prompt_tokens": len(prompt.input_ids),
        "spent": None if stats.spent is None else float(stats.spent[index]),
    }
    if given.tests is not None:
        row["tests"] = given.tests
    if log is not None:
        row["token_log"] = log.of(index, len(tokens))
    return row


def _batch(result: BatchResult) -> dict[str, Any]:
    line = {
        "rows": len(result.tokens),
        "seconds": result.seconds,
        "verifier_passes": result.stats.verifier_passes,
        "drafter_passes": result.stats.drafter_passes,
        "positions": {name: values.tolist() for name, values in result.stats.positions.items()},
    }
    return line if result.ran is None else line | {"ran": result.ran}


def _summary(
    folder: OutputFolder, named: Mapping[str, Rule], mismatches: Mapping[str, list[str]], config: DecodeConfig
) -> dict[str, Any]:
    rows, batches = list(folder.rows()), list(read_lines(folder.folder / BATCHES))
    try:
        rules = {
            label: summarize_rule(
                [row for row in rows if row["rule"] == label], [b for b in batches if b["rule"] == label]
            )
            | {"accepted_mismatches": mismatches[label], "dial": _dial(rule)}
            for label, rule in named.items()
        }
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # lines of an earlier release, altered since
        raise InputError(
            f"{folder.folder} is damaged ({str(error)[:80]}); decode again with --fresh"
        ) from error
    return {
        "rules": rules,
        "repetitions": config.repetitions,
        "settings": config.settings.described(),
        "provenance": provenance.collect({"decode": config.settings.seed}),
    }
