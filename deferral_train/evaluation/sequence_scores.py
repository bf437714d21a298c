"""Rules and heads on labelled places: what the finished texts lose by what a rule keeps, against what it rejects.

Every rule, with a head or without, is scored by the same labels. N labelled places, P prompts, S settings of a rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.families import Family, make_families
from deferral_train.evaluation.sequence import quantiles_of_estimates
from deferral_train.evaluation.token_pairs import token_pairs
from deferral_train.rules.base import PositionRule, Rule, TokenRule
from deferral_train.rules.learned import LearnedRule
from deferral_train.rules.summary import Summary
from deferral_train.rules.token_gap import TokenGapRule
from deferral_train.traces import Traces
from deferral_train.traces.sequence import check_one_kind, labelled_rows, sequence_gap, sequence_summary

FILE, PAIRS = "sequence_scores.json", "token_pairs.json"
TOKEN_NEEDS = ("token", "drafter_logprob", "verifier_logprob")
SHARES = tuple(
    round(0.05 * step, 2) for step in range(1, 20)
)  # of places kept, where a head's alphas are taken
SHOWN = (0.25, 0.5, 0.75)  # kept shares in the printed table


@dataclass(frozen=True)
class SequenceScore:
    """One setting of a rule.

    Attributes:
        value: of its dial; None without one.
        kept: share of the labelled places that it keeps.
        rejection_rate: mean chance per labelled place that a drafted token is rejected, r times D_TV.
        kept_gap: mean gap of what it keeps, low and high its interval over prompts.
        loss: summed gap of what it keeps per text, over the label share, with its interval.
    """

    value: float | None
    kept: float
    rejection_rate: float
    kept_gap: tuple[float, float | None, float | None]
    loss: tuple[float, float | None, float | None]


@dataclass(frozen=True)
class SequenceScores:
    """All rules on one set of labels.

    Attributes:
        rules: name to its settings, ascending in the share that is kept.
        left_out: rule to why it could not be scored here.
        meta: labels, prompts, places.
    """

    rules: dict[str, list[SequenceScore]]
    left_out: dict[str, str]
    meta: dict[str, Any]

    def at_kept(self, name: str, share: float) -> float:
        """Mean gap of what a rule keeps where it keeps this share, linear between its settings."""
        scores = self.rules[name]
        return float(np.interp(share, [one.kept for one in scores], [one.kept_gap[0] for one in scores]))

    def write(self, folder: Path) -> Path:
        """Write ``sequence_scores.json``."""
        rules = {name: [asdict(one) for one in scores] for name, scores in self.rules.items()}
        provenance.write_json(folder / FILE, {"meta": self.meta, "rules": rules, "left_out": self.left_out})
        return folder / FILE

    def text(self) -> str:
        """A line per rule: the mean gap of what it keeps where it keeps a quarter, a half, three quarters."""
        unit = self.meta["unit"]
        lines = [
            f"mean sequence gap ({unit}) of the places kept, at kept shares of the {self.meta['places']:,} labelled"
        ]
        lines.append(f"{'rule':<40} " + " ".join(f"{share:>9.0%}" for share in SHOWN))
        order = sorted(self.rules, key=lambda name: self.at_kept(name, 0.5))
        lines += [
            f"{name[-40:]:<40} " + " ".join(f"{self.at_kept(name, share):>9.4f}" for share in SHOWN)
            for name in order
        ]
        lines += [f"{name}: not scored, {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def score_sequences(
    traces: Sequence[Traces],
    rules: Iterable[Rule | str],
    *,
    grid: int = 40,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> SequenceScores:
    """Score rules by sequence labels.

    Args:
        traces: folders with labels of one kind.
        rules: names, specs or rules, swept over their dials; a head's alphas are quantiles of its estimates.
        grid: dial points of rules without a head.
        bootstrap: redraws of prompts. seed, confidence: of the intervals.

    Raises:
        InputError: traces without such labels, or with labels of several kinds.
    """
    check_one_kind(traces)
    families = make_families(rules, grid)
    usable = [family for family in families if isinstance(family.rule, PositionRule | TokenRule)]
    left_out = {
        family.name: "its decision is a distribution over the vocabulary"
        for family in families
        if family not in usable
    }
    places = _places(traces, usable)
    redraws = PromptBootstrap(places.prompts, bootstrap, seed, confidence)
    scores = {family.name: _scores(family, traces, places, redraws) for family in usable}
    labels = dict(traces[0].manifest.labels)
    metrics = labels["metrics"]
    unit = metrics[0] if len(metrics) == 1 else f"deviations of {' and '.join(metrics)}"
    meta = {"labels": labels, "prompts": places.prompts, "places": len(places.gap), "unit": unit}
    return SequenceScores(scores, left_out, meta)


def write_pairs(traces: Sequence[Traces], rules: Iterable[Rule | str], tokenizer: Any, folder: Path) -> str:
    """Token pairs of every head among the rules: written to ``token_pairs.json``, and as text."""
    heads = {
        family.name: family.rule.head
        for family in make_families(rules)
        if isinstance(family.rule, LearnedRule)
    }
    found = {name: token_pairs(traces, head, tokenizer) for name, head in heads.items()}
    provenance.write_json(folder / PAIRS, {name: pairs.as_dict() for name, pairs in found.items()})
    return "\n\n".join(f"{name}\n{pairs.text()}" for name, pairs in found.items())


@dataclass(frozen=True)
class _Places:
    """Labelled places of all traces: summary, gap [N], tv [N], prompt [N] from 0, label share."""

    summary: Summary
    gap: np.ndarray
    tv: np.ndarray
    prompt: np.ndarray
    prompts: int
    share: float


def _places(traces: Sequence[Traces], families: Sequence[Family]) -> _Places:
    names = frozenset({"tv", *TOKEN_NEEDS}).union(*(family.rule.needs for family in families))
    parts, gaps, prompts, count = [], [], [], 0
    for part in traces:
        rows = labelled_rows(part)
        parts.append(sequence_summary(part, sorted(names)).select(rows))
        gaps.append(sequence_gap(part)[rows].numpy())
        found, place = np.unique(part.prompt_of_row, return_inverse=True)
        prompts.append(place[rows.numpy()] + count)
        count += len(found)
    joined = Summary({name: torch.cat([part[name] for part in parts]) for name in sorted(names)})
    gap = np.concatenate(gaps).astype(np.float64)
    share = float(traces[0].manifest.labels["share"])
    return _Places(joined, gap, joined["tv"].double().numpy(), np.concatenate(prompts), count, share)


def _scores(
    family: Family, traces: Sequence[Traces], places: _Places, redraws: PromptBootstrap
) -> list[SequenceScore]:
    values: Sequence[float | None] = family.values
    if isinstance(family.rule, LearnedRule | TokenGapRule):
        values = sorted(
            {*quantiles_of_estimates(traces[0], family.rule.head, SHARES)} | {family.chosen or 0.0}
        )
    found = []
    for value in values:
        rule = family.rule if value is None else family.rule.with_dial(value)
        found.append(_score(value, defers(rule, places.summary).numpy(), places, redraws))
    return sorted(found, key=lambda one: one.kept)


def defers(rule: Rule, summary: Summary) -> Tensor:
    """Decisions of a rule on the summary's token, bool [N]: True where it defers.

    Raises:
        InputError: a rule that answers neither for a position nor for a token.
    """
    if isinstance(rule, PositionRule):
        return rule.defer(summary)
    if not isinstance(rule, TokenRule):
        raise InputError(f"rule {rule.name}: it decides by a distribution; decode it instead")
    token, drafter, verifier = (summary[name].unsqueeze(-1) for name in TOKEN_NEEDS)
    return ~rule.alone.keep_tokens(token.long(), drafter, verifier, summary)[..., 0]


def _score(
    value: float | None, defer: np.ndarray, places: _Places, redraws: PromptBootstrap
) -> SequenceScore:
    kept = ~defer
    by_prompt = {
        name: np.bincount(places.prompt, weights=weight, minlength=places.prompts)
        for name, weight in (("gap", places.gap * kept), ("kept", kept.astype(float)))
    }
    loss = redraws.mean(by_prompt["gap"] / places.share)
    mean: tuple[float, float | None, float | None] = (0.0, None, None)
    if kept.any():
        mean = _mean_of_kept(by_prompt["gap"], by_prompt["kept"], redraws)
    rejected = float((defer * places.tv).mean())
    return SequenceScore(value, float(kept.mean()), rejected, mean, (loss.value, loss.low, loss.high))


def _mean_of_kept(
    gap: np.ndarray, kept: np.ndarray, redraws: PromptBootstrap
) -> tuple[float, float | None, float | None]:
    """Mean gap of what is kept, from sums per prompt [P], over the redraws that hold something kept."""
    value = float(gap.sum() / kept.sum())
    if not redraws.replicates:
        return value, None, None
    sums, counts = redraws.sums(gap), redraws.sums(kept)
    told = counts > 0.5
    low, high = redraws.percentiles(sums[told] / counts[told])
    return value, float(low), float(high)
