"""Expected acceptance, deferral and calls of rules on trace folders, summed per prompt and draft index, and grouped.

Blocks follow the chain of :mod:`deferral_train.evaluation.survival`. U prompts of all folders together (the same prompt
under two pairs counts twice), S rules, g draft tokens in a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deferral_train.evaluation.bootstrap import Interval, Redraws
from deferral_train.evaluation.breakdowns.prompts import Part
from deferral_train.evaluation.breakdowns.tables import Row
from deferral_train.evaluation.positions import read_positions
from deferral_train.evaluation.survival import ExpectedWork, expected_work
from deferral_train.rules.base import PositionRule, Rule

ACCEPTANCE, DEFERRAL, LENGTH = "acceptance", "deferral rate", "tokens per verifier call"


@dataclass(frozen=True)
class WorkByPrompt:
    """Expected work of U prompts under S rules.

    Attributes:
        rules: [S] labels.
        part: [U] number of each prompt's folder.
        prompt: [U] its id.
        tokens: [U] logged positions.
        work: [U, S] and, by draft index, [U, S, g].
    """

    rules: tuple[str, ...]
    part: np.ndarray
    prompt: tuple[str, ...]
    tokens: np.ndarray
    work: ExpectedWork


def work_by_prompt(
    parts: Sequence[Part], rules: Mapping[str, Rule], num_draft_tokens: int, temperature: float | None
) -> WorkByPrompt:
    """Walk every folder once.

    Args:
        rules: label -> rule at a fixed value of its dial.
        temperature: of the sampling distributions, None for each folder's own.
    """
    needs = frozenset().union(*(rule.needs for rule in rules.values()))
    candidates = not all(isinstance(rule, PositionRule) for rule in rules.values())
    work, tokens = [], []
    numbers: list[int] = []
    names: list[str] = []
    for number, part in enumerate(parts):
        table = read_positions(
            part.traces, needs, truth="verifier", temperature=temperature, with_candidates=candidates
        )
        limit = part.traces.manifest.settings.get("max_new_tokens")
        work.append(expected_work(table, list(rules.values()), num_draft_tokens, limit=limit))
        tokens.append(table.rows_per_prompt.astype(np.float64))
        numbers += [number] * table.prompts
        names += table.prompt_ids
    joined = ExpectedWork.joined(work)
    return WorkByPrompt(tuple(rules), np.array(numbers), tuple(names), np.concatenate(tokens), joined)


def _rates(
    judged: np.ndarray, rejected: np.ndarray, deferred: np.ndarray, redraws: Redraws
) -> dict[str, Interval | None]:
    """Acceptance and deferral from sums over each prompt, [U]."""
    return {
        ACCEPTANCE: redraws.ratio(judged - rejected, judged),
        DEFERRAL: redraws.ratio(deferred, judged),
    }


def by_draft_index(found: WorkByPrompt, redraws: Redraws) -> list[Row]:
    """A row per rule and draft index; ``reached`` is the share of blocks that draft and judge it."""
    work, rows = found.work, []
    assert work.deferred_at is not None
    for s, rule in enumerate(found.rules):
        for index in range(work.judged_at.shape[2]):
            judged = work.judged_at[:, s, index]
            numbers = _rates(judged, work.rejected_at[:, s, index], work.deferred_at[:, s, index], redraws)
            numbers["reached"] = redraws.ratio(judged, work.calls[:, s])
            rows.append(Row.of(str(index + 1), rule, judged, numbers))
    return rows


def by_group(found: WorkByPrompt, groups: Sequence[str], redraws: Redraws) -> list[Row]:
    """A row per group of prompts and rule; ``groups`` [U], in order of appearance."""
    work, rows = found.work, []
    assert work.deferred is not None
    judged, rejected, deferred = work.judged, work.rejected, work.deferred
    names = np.array(groups, dtype=object)
    for name in dict.fromkeys(groups):
        own = names == name
        for s, rule in enumerate(found.rules):
            numbers = _rates(judged[own, s], rejected[own, s], deferred[own, s], redraws)
            numbers[LENGTH] = redraws.ratio(found.tokens[own], work.calls[own, s])
            rows.append(Row.of(name, rule, found.tokens[own], numbers))
    return rows
