"""Which breakdowns there are, what each needs, and the tables of those that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.decoding.settings import Settings
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import Redraws
from deferral_train.evaluation.breakdowns import copies, decoded, rates
from deferral_train.evaluation.breakdowns.prompts import Part
from deferral_train.evaluation.breakdowns.tables import Breakdowns, Row, Table
from deferral_train.evaluation.families import make_families
from deferral_train.rules import make_rule
from deferral_train.rules.base import Rule

BREAKDOWNS = ("position", "copy_rate", "domain", "architecture", "max_gram", "drafting")
WITH_PROMPTS = frozenset({"copy_rate", "max_gram"})
FROM_TRACES = frozenset(BREAKDOWNS) - {"drafting"}
EXPECTED = "Lossless speculation unless a rule is named; expected along the logged prefixes."


def check_names(names: Sequence[str], *, traces: bool, prompts: bool, tokenizer: bool, decoded: bool) -> None:
    """Refuse an unknown breakdown, or one whose material was not given, before any work.

    Raises:
        InputError: naming the breakdown and the flag.
    """
    unknown = [name for name in names if name not in BREAKDOWNS]
    if unknown:
        raise InputError(f"breakdown {unknown[0]!r} is unknown; known: {', '.join(BREAKDOWNS)}")
    for name in names:
        if name in FROM_TRACES and not traces:
            raise InputError(f"breakdown {name} is made from traces; give traces")
        if name in WITH_PROMPTS and not (prompts and tokenizer):
            raise InputError(
                f"breakdown {name} reads the prompts, which traces do not hold; give prompts, the file that they were "
                "collected from, and tokenizer, a checkpoint of their pair"
            )
        if name == "drafting" and not decoded:
            raise InputError("breakdown drafting sets decode runs side by side; give decoded, their folders")


def fixed_rules(rules: Sequence[Rule | str] | Mapping[str, Rule | str]) -> dict[str, Rule]:
    """``lossless``, and of ``rules`` those at a fixed value of their dial, by label."""
    found: dict[str, Rule] = {"lossless": make_rule("lossless")}
    for family in make_families(rules, grid=1) if rules else ():
        if family.rule.dial is None:
            found[family.name] = family.rule
        elif family.chosen is not None:
            found[f"{family.name} at {family.parameter}={family.chosen:g}"] = family.rule.with_dial(
                family.chosen
            )
    return {label: rule for label, rule in found.items() if rule.drafts}


def make_breakdowns(
    parts: Sequence[Part],
    names: Sequence[str],
    rules: Sequence[Rule | str] | Mapping[str, Rule | str] = (),
    *,
    decode_folders: Sequence[str | Path] = (),
    num_draft_tokens: int = Settings.num_draft_tokens,
    temperature: float | None = None,
    redraws: Redraws = Redraws(),  # noqa: B008 - frozen
    max_gram: MaxGram | None = None,
) -> Breakdowns:
    """Tables of acceptance and deferral, of Max-Gram's failures, and of decode runs side by side.

    Args:
        parts: trace folders, of one pair or several, see :func:`read_part`.
        names: of :data:`BREAKDOWNS`.
        rules: those with a fixed dial value are shown beside ``lossless``; others are left out.
        decode_folders: of ``decode``, for ``drafting``.
        num_draft_tokens: drafted tokens in a block.
        temperature: of the sampling distributions, None for each folder's own.
        redraws: of prompts, for intervals.
        max_gram: how it proposes, default as published, without bigrams.

    Raises:
        InputError: an unknown breakdown, or one whose material is missing.
    """
    with_prompts = all(part.prompt_ids is not None for part in parts)
    check_names(
        names, traces=bool(parts), prompts=with_prompts, tokenizer=with_prompts, decoded=bool(decode_folders)
    )
    tables = []
    fixed: dict[str, Rule] = {}
    if FROM_TRACES & set(names):
        fixed = fixed_rules(rules)
        tables = _trace_tables(
            parts, names, fixed, num_draft_tokens, temperature, redraws, max_gram or MaxGram()
        )
    if "drafting" in names:
        rows = decoded.settings_table([Path(folder) for folder in decode_folders], redraws)
        note = "Times are of each folder's own machine and day."
        tables.append(Table("drafting", "Drafters and drafting settings, decoded", "decode run", rows, note))
    order = {name: place for place, name in enumerate(names)}
    tables.sort(key=lambda table: order[table.name.partition(":")[0]])
    meta = {
        "rules": list(fixed),
        "num_draft_tokens": num_draft_tokens,
        "temperature": [
            part.traces.manifest.temperature if temperature is None else temperature for part in parts
        ],
        "prefixes": [part.traces.manifest.prefixes for part in parts],
        "traces": [part.name for part in parts],
        "bootstrap": redraws.replicates,
        "seed": redraws.seed,
        "confidence": redraws.confidence,
    }
    return Breakdowns(tables, meta)


def _trace_tables(
    parts: Sequence[Part],
    names: Sequence[str],
    rules: Mapping[str, Rule],
    num_draft_tokens: int,
    temperature: float | None,
    redraws: Redraws,
    max_gram: MaxGram,
) -> list[Table]:
    work = rates.work_by_prompt(parts, rules, num_draft_tokens, temperature)
    pairs = [parts[number].architecture for number in work.part]
    several = len(set(pairs)) > 1
    domains = [parts[part].domains[prompt] for part, prompt in zip(work.part, work.prompt)]
    if several:
        domains = [f"{pair}: {domain}" for pair, domain in zip(pairs, domains)]
    tables = []
    if "position" in names:
        rows = rates.by_draft_index(work, redraws)
        note = f"{EXPECTED} Reached: share of blocks that draft and judge this place."
        tables.append(Table("position", "Acceptance by place in the block", "place", rows, note))
    if "domain" in names:
        rows = rates.by_group(work, domains, redraws)
        tables.append(Table("domain", "Acceptance by domain", "domain", rows, EXPECTED))
    if "architecture" in names:
        rows = rates.by_group(work, pairs, redraws)
        tables.append(Table("architecture", "Acceptance by pair of models", "pair", rows, EXPECTED))
    if set(names) & WITH_PROMPTS:
        tables += _copy_tables(parts, names, work, domains, redraws, max_gram)
    return tables


def _copy_tables(
    parts: Sequence[Part],
    names: Sequence[str],
    work: rates.WorkByPrompt,
    domains: Sequence[str],
    redraws: Redraws,
    max_gram: MaxGram,
) -> list[Table]:
    found = {(text.part, text.prompt): text for text in copies.logged_texts(parts)}
    texts = [found[int(part), prompt] for part, prompt in zip(work.part, work.prompt)]
    shares = copies.copy_rates(parts, texts)
    bins = copies.quantile_bins(shares)
    tables = []
    if "copy_rate" in names:
        rows = _sorted(rates.by_group(work, bins, redraws))
        note = (
            f"{EXPECTED} Copy rate: share of a text's tokens that occur in its prompt, in {len(set(bins))} bins of as "
            f"near equal numbers of prompts as ties allow; mean {shares.mean():.3f}."
        )
        tables.append(Table("copy_rate", "Acceptance by copy rate", "copy rate", rows, note))
    if "max_gram" in names:
        failures = copies.count_failures(parts, texts, max_gram)
        note = "Max-Gram proposes one token at every logged position; no proposal counts as a failure."
        title = "Max-Gram's failures by class of input"
        tables.append(Table("max_gram", title, "what it matched", copies.by_match(failures, redraws), note))
        tables.append(
            Table("max_gram:copy_rate", title, "copy rate", _sorted(copies.by_class(failures, bins, redraws)))
        )
        if len(set(domains)) > 1:
            tables.append(
                Table("max_gram:domain", title, "domain", copies.by_class(failures, domains, redraws))
            )
    return tables


def _sorted(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.group)
