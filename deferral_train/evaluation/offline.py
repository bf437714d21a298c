"""`score_rules`: any rules and heads, over their dials, from traces alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deferral_train.decoding.drafting.speed import SpeedModel
from deferral_train.decoding.settings import Settings
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.calibration import reliability
from deferral_train.evaluation.families import Family, make_families
from deferral_train.evaluation.positions import Positions, read_positions
from deferral_train.evaluation.prefixes import slider_prefixes
from deferral_train.evaluation.scan import FamilySums, Oracle, scan
from deferral_train.evaluation.table import RuleScores, ScoreTable
from deferral_train.heads.pairing import check_vocabulary, fitted_parts
from deferral_train.rules.base import PositionRule, Rule
from deferral_train.rules.learned import LearnedRule
from deferral_train.rules.registry import make_rule
from deferral_train.traces import Traces

ANCHORS = ("drafter_only", "lossless", "opt")
# Per-prompt sums divided by rows, as they are called in tables.
METRICS = {
    "deferred": "deferral_rate",
    "rejected": "rejection_rate",
    "loss": "risk",
    "emitted_loss": "emitted_risk",
    "regret": "regret",
    "oracle_loss": "oracle_priced_risk",
    "calls": "calls_per_token",
    "candidate_bound": "rejection_bound",
}
COST_KEYS = frozenset({"drafter", "verifier", "verifier_token", "head"})


def score_rules(
    traces: Traces | Sequence[Traces],
    rules: Iterable[Rule | str] | Mapping[str, Rule | str],
    *,
    loss: str = "zero_one",
    truth: str = "reference",
    grid: int | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    costs: Mapping[str, float] | None = None,
    temperature: float | None = None,
    num_draft_tokens: int = Settings.num_draft_tokens,
    confidence: float = 0.95,
    prefixes: int = 0,
    workers: int | None = None,
) -> ScoreTable:
    """Score rules on logged positions.

    Risk is the loss of the model that each position is left to, E_P[(1-r) l(y,q) + r l(y,p)]; emitted risk,
    which also token and distribution rules have, that of the emitted token. Rejection rate is the mean of D_TV(q,
    pi). Acceptance length, tokens per verifier call with the bonus, follows from survival position by
    position (:mod:`deferral_train.evaluation.survival`).

    Args:
        traces: one trace folder, opened; or several of one pair.
        rules: names, specs, rules (each swept over its dial), or a mapping from the name to be shown.
            `drafter_only`, `lossless` and `opt` are always added.
        loss: ``"zero_one"``, ``"log"`` or ``"prob"``. truth: ``"reference"``, ``"verifier"``, ``"teacher"``
            or ``"exact"``, see :mod:`deferral_train.traces.truth`.
        grid: dial points (default 40), values, or values by rule name.
        bootstrap: redraws of prompts for intervals; 0 for none. seed: of the redraws.
        costs: measured seconds ``drafter``, ``verifier`` (one block) and optionally ``verifier_token``,
            ``head``; gives the latency relative to the verifier alone.
        temperature: of the sampling distributions: 0, 1, or the one that the traces were made for (default).
        num_draft_tokens: drafted tokens in a block.
        confidence: of the intervals.
        prefixes: prompts whose tokens are kept for the report's alpha slider.
        workers: threads, default one per core up to 4.

    Raises:
        InputError: traces of different pairs, a head of another vocabulary, too few prompts for the bootstrap, a
            truth or a field that the traces do not hold, an unknown rule.
    """
    settings = ScoreSettings(
        loss,
        truth,
        grid,
        bootstrap,
        seed,
        costs,
        temperature,
        num_draft_tokens,
        confidence,
        prefixes,
        workers,
    )
    families = _with_anchors(make_families(rules, grid))
    _check_heads(families, [traces] if isinstance(traces, Traces) else traces)
    part = read_positions(
        traces,
        frozenset().union(*(family.rule.needs for family in families)),
        loss=loss,
        truth=truth,
        temperature=temperature,
        with_candidates=any(not isinstance(family.rule, PositionRule) for family in families),
    )
    redraws = PromptBootstrap(part.prompts, bootstrap, seed, confidence)
    oracle = Family("oracle", Oracle(), tuple(np.linspace(-2, 2, 81)))
    scanned = scan([*families, oracle], part, num_draft_tokens=num_draft_tokens, workers=workers)
    scores = {sums.family.name: _scores(sums, part, redraws, settings) for sums in scanned}
    _add_agreement(scores, {sums.family.name: sums for sums in scanned}, len(part))
    unbounded = [
        sums.family.name
        for sums in scanned
        if not isinstance(sums.family.rule, PositionRule) and "candidate_bound" not in sums.sums
    ]
    slider = slider_prefixes(families, part, prefixes) if prefixes else None
    calibration = _calibration(families, part, redraws)
    return ScoreTable(
        settings.header() | part.meta | ({"unbounded": unbounded} if unbounded else {}),
        scores,
        redraws,
        part.rows_per_prompt,
        calibration,
        slider,
    )


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of one :func:`score_rules` call, checked; the fields are its arguments."""

    loss: str
    truth: str
    grid: int | Sequence[float] | Mapping[str, Sequence[float]] | None
    bootstrap: int
    seed: int
    costs: Mapping[str, float] | None
    temperature: float | None
    num_draft_tokens: int
    confidence: float
    prefixes: int
    workers: int | None

    def __post_init__(self) -> None:
        if isinstance(self.grid, int) and self.grid < 1:
            raise InputError(f"grid is {self.grid}; give at least 1 dial point, or leave it out for 40")
        if self.bootstrap < 0:
            raise InputError(f"bootstrap is {self.bootstrap}; give a number of redraws, 0 for none")
        if self.num_draft_tokens < 1:
            raise InputError(f"num_draft_tokens is {self.num_draft_tokens}; give at least 1")
        if not 0 < self.confidence < 1:
            raise InputError(
                f"confidence is {self.confidence}; give a number between 0 and 1, for example 0.95"
            )
        if self.costs is None:
            return
        unknown, missing = set(self.costs) - COST_KEYS, {"drafter", "verifier"} - set(self.costs)
        if unknown or missing:
            raise InputError(
                f"costs has unknown {sorted(unknown)} and lacks {sorted(missing)}; give seconds as "
                "{'drafter': .., 'verifier': ..} with optional verifier_token and head"
            )
        if min(self.costs.values()) < 0 or min(self.costs["drafter"], self.costs["verifier"]) <= 0:
            raise InputError(f"costs must be positive seconds, got {dict(self.costs)}")

    @property
    def speed_model(self) -> SpeedModel | None:
        """Of the costs; None without."""
        return None if self.costs is None else SpeedModel.of_passes(**self.costs)

    def header(self) -> dict[str, Any]:
        """The table's header, as far as it does not depend on the traces."""
        costs = None if self.costs is None else {**self.costs, "num_draft_tokens": self.num_draft_tokens}
        return {
            "loss": self.loss,
            "truth": self.truth,
            "oracle": "decides in hindsight, not attainable"
            if self.truth == "reference"
            else "the optimal rule",
            "num_draft_tokens": self.num_draft_tokens,
            "bootstrap": {
                "replicates": self.bootstrap,
                "seed": self.seed,
                "confidence": self.confidence,
                "unit": "prompt",
            },
            "costs": costs,
        }


def _check_heads(families: Sequence[Family], traces: Sequence[Traces]) -> None:
    """Heads of the traces' vocabulary; other weights are what a transfer study compares."""
    for family in families:
        for fitted in fitted_parts(family.rule):
            for part in traces:
                check_vocabulary(fitted, part.manifest.pair)


def _with_anchors(families: list[Family]) -> list[Family]:
    present = {family.name for family in families}
    return [*families, *(make_families([make_rule(name)])[0] for name in ANCHORS if name not in present)]


def _scores(
    sums: FamilySums, part: Positions, redraws: PromptBootstrap, settings: ScoreSettings
) -> RuleScores:
    """Ratios of sums over prompts, and their redraws."""
    metrics: dict[str, np.ndarray] = {}
    redrawn: dict[str, np.ndarray] = {}
    rows = part.rows_per_prompt
    redrawn_rows = redraws.sums(rows)
    for name, metric in METRICS.items():
        if name in sums.sums:
            metric = "hindsight_excess" if metric == "regret" and part.truth == "reference" else metric
            metrics[metric] = sums.total(name) / rows.sum()
            redrawn[metric] = redraws.sums(sums.sums[name]) / redrawn_rows
    for table in (metrics, redrawn):
        table["acceptance_length"] = 1 / table["calls_per_token"]
        if settings.speed_model is not None:
            calls = table["calls_per_token"]
            table["relative_latency"] = settings.speed_model.relative(calls, settings.num_draft_tokens)
    family = sums.family
    return RuleScores(
        family.name,
        family.rule.name,
        family.parameter,
        family.values,
        family.chosen,
        metrics,
        redrawn,
        per_prompt=sums.sums,
    )


def _add_agreement(scores: dict[str, RuleScores], scanned: Mapping[str, FamilySums], rows: int) -> None:
    """Share of positions with the same decision as a judge at the setting of nearest rejection rate."""
    for metric, judge in (("agreement_opt", "opt"), ("agreement_oracle", "oracle")):
        for name, sums in scanned.items():
            if any(block is None for block in sums.decisions) or name == judge:
                continue
            wanted = scores[name].metrics["rejection_rate"]
            nearest = np.abs(wanted[:, None] - scores[judge].metrics["rejection_rate"]).argmin(axis=1)
            scores[name].agreement[metric] = 1 - _differing(sums, scanned[judge], nearest) / rows


def _differing(sums: FamilySums, judge: FamilySums, settings: np.ndarray) -> np.ndarray:
    """Positions at which the packed decisions differ from the judge's at the given settings, [S]."""
    total = np.zeros(len(settings), dtype=np.int64)
    for own, other in zip(sums.decisions, judge.decisions):
        assert own is not None
        assert other is not None
        total += np.bitwise_count(own ^ other[settings]).sum(axis=1, dtype=np.int64)
    return total


def _calibration(families: list[Family], part: Positions, redraws: PromptBootstrap) -> dict[str, Any]:
    """Reliability of every estimate of the gap: the heads' and OPT's plug-in."""
    estimates = {
        family.name: _head_gap(family.rule, part)
        for family in families
        if isinstance(family.rule, LearnedRule) and getattr(family.rule.head, "loss", part.loss) == part.loss
    }
    if part.loss == "zero_one":
        estimates["opt"] = part.columns["verifier_max"] - part.columns["drafter_max"]
    observed = part.losses.gap
    return {name: reliability(gap, observed, part.prompt, redraws) for name, gap in estimates.items()}


def _head_gap(rule: LearnedRule, part: Positions) -> np.ndarray:
    return np.concatenate([rule.head.gap(block.summary).numpy() for block in part.blocks()])
