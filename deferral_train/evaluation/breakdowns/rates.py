"""Expected acceptance, deferral and calls of rules on trace folders, summed per prompt and place, and grouped.

Blocks follow the chain of :mod:`deferral_train.evaluation.survival`. U prompts of all folders together (the same prompt
under two pairs counts twice), S rules, g places in a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deferral_train.evaluation.bootstrap import Interval
from deferral_train.evaluation.breakdowns.prompts import Part
from deferral_train.evaluation.breakdowns.tables import Redraws, Row
from deferral_train.evaluation.laws import deferral_and_rejection
from deferral_train.evaluation.positions import read_positions
from deferral_train.evaluation.survival import block_chain
from deferral_train.rules.base import PositionRule, Rule

ACCEPTANCE, DEFERRAL, LENGTH = "acceptance", "deferral rate", "tokens per verifier call"


@dataclass(frozen=True)
class Work:
    """Sums per prompt.

    Attributes:
        rules: labels [S]. part, prompt: of each prompt, number of its folder [U] and its id [U].
        tokens: logged positions [U]. calls: [U, S]. judged, rejected, deferred: [U, S, g].
    """

    rules: tuple[str, ...]
    part: np.ndarray
    prompt: tuple[str, ...]
    tokens: np.ndarray
    calls: np.ndarray
    judged: np.ndarray
    rejected: np.ndarray
    deferred: np.ndarray


def expected_work(
    parts: Sequence[Part], rules: Mapping[str, Rule], num_draft_tokens: int, temperature: float | None
) -> Work:
    """Walk every folder once.

    Args:
        rules: label -> rule at a fixed value of its dial.
        temperature: of the sampling laws, None for each folder's own.
    """
    needs = frozenset().union(*(rule.needs for rule in rules.values()))
    candidates = not all(isinstance(rule, PositionRule) for rule in rules.values())
    columns: list[tuple[np.ndarray, ...]] = []
    numbers, names = [], []
    for number, part in enumerate(parts):
        table = read_positions(
            part.traces, needs, truth="verifier", temperature=temperature, with_candidates=candidates
        )
        limit = part.traces.manifest.settings.get("max_new_tokens")
        for block in table.blocks():
            rates = [deferral_and_rejection(rule, block) for rule in rules.values()]
            deferral, rejection = (np.concatenate(side, axis=1) for side in zip(*rates))
            cut = None if limit is None else block.layout.lengths == limit
            work = block_chain(1 - rejection, block.layout, num_draft_tokens, deferral, cut)
            assert work.deferred_at is not None
            tokens = block.layout.lengths.astype(np.float64)
            columns.append((tokens, work.calls, work.judged_at, work.rejected_at, work.deferred_at))
        numbers += [number] * table.prompts
        names += table.prompt_ids
    joined = [np.concatenate(column) for column in zip(*columns)]
    return Work(tuple(rules), np.array(numbers), tuple(names), *joined)


def by_place(work: Work, redraws: Redraws) -> list[Row]:
    """A row per rule and place in the block; ``reached`` is the share of blocks that draft and judge this place."""
    rows = []
    for s, rule in enumerate(work.rules):
        blocks = work.calls[:, s]
        for place in range(work.judged.shape[2]):
            judged, rejected, deferred = (
                values[:, s, place] for values in (work.judged, work.rejected, work.deferred)
            )
            numbers = {
                ACCEPTANCE: redraws.ratio(judged - rejected, judged),
                DEFERRAL: redraws.ratio(deferred, judged),
                "reached": redraws.ratio(judged, blocks),
            }
            rows.append(_row(str(place + 1), rule, judged, judged, numbers))
    return rows


def by_group(work: Work, groups: Sequence[str], redraws: Redraws) -> list[Row]:
    """A row per group of prompts and rule; ``groups`` [U], in order of appearance."""
    rows = []
    names = np.array(groups, dtype=object)
    for name in dict.fromkeys(groups):
        own = names == name
        for s, rule in enumerate(work.rules):
            judged, rejected, deferred = (
                values[own, s].sum(-1) for values in (work.judged, work.rejected, work.deferred)
            )
            numbers = {
                ACCEPTANCE: redraws.ratio(judged - rejected, judged),
                DEFERRAL: redraws.ratio(deferred, judged),
                LENGTH: redraws.ratio(work.tokens[own], work.calls[own, s]),
            }
            rows.append(_row(name, rule, work.tokens[own], work.tokens[own], numbers))
    return rows


def _row(
    group: str, rule: str, weights: np.ndarray, tokens: np.ndarray, numbers: Mapping[str, Interval | None]
) -> Row:
    found = {name: number for name, number in numbers.items() if number is not None}
    return Row(group, rule, int((weights > 0).sum()), float(tokens.sum()), found)
