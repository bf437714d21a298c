"""Counts of reviews: what was tried and accepted, by place within the run of one source's tokens."""

from __future__ import annotations

import pytest
import torch
from decoding.helpers import generate, pair_of

from deferral_train.decoding.drafting import DraftCascade, Plan
from deferral_train.decoding.drafting.counts import ReviewCounts
from deferral_train.errors import InputError


def test_places_are_counted_up_to_the_first_rejection() -> None:
    counts = ReviewCounts(1)
    # Row 0: two of drafter 0, then three of Max-Gram; four stand. Row 1: nothing proposed. Row 2: not asked for.
    sources = [[0, 0, 1, 1, 1], [], [0]]
    counts.add(0, sources, [False, True, False], [4, 0, 1], rows=[0, 1])
    assert counts.tried == {(0, 0): [1, 1], (0, 1): [2, 1, 1]}
    assert counts.accepted == {(0, 0): [1, 1], (0, 1): [1, 1, 0]}
    assert counts.reviews == [2, 0]
    assert counts.rate(0, 0) == 1.0
    assert counts.rate(0, 1) == 0.5
    assert counts.rate(1, 1) is None
    # A proposal that stands whole and was shorter than asked for: the next place is empty.
    counts.add(1, [[1, 1]], [True], [2], rows=[0])
    assert counts.tried[1, 1] == [1, 1, 1]
    assert counts.accepted[1, 1] == [1, 1, 0]


def test_rates_pool_the_last_places_and_counts_add_up() -> None:
    one, two = ReviewCounts(1), ReviewCounts(1)
    one.tried[0, 0], one.accepted[0, 0] = [40, 20, 10], [20, 10, 5]
    two.tried[0, 0], two.accepted[0, 0] = [60, 20, 10, 6], [30, 10, 10, 6]
    two.tried[0, 1], two.accepted[0, 1] = [3], [1]
    both = ReviewCounts.joined([one, two])
    assert both.tried[0, 0] == [100, 40, 20, 6]
    assert both.acceptance(least=25) == {(0, 0): [0.5, 0.5, 21 / 26], (0, 1): [1 / 3]}
    with pytest.raises(InputError, match="all of the same drafters"):
        ReviewCounts.joined([one, ReviewCounts(2)])


def test_a_run_tells_its_counts() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 5, 6], [9, 9, 9, 9, 9]])}
    cascade = DraftCascade([drafter], Plan([[3, 0], [0, 4]]))
    result = generate(cascade, verifier, inputs, "lossless", max_new_tokens=12)
    counts, stats = result.reviews, result.stats
    assert counts.reviews == [int(stats.verifier_calls.sum()), int(stats.drafter_calls.sum())]
    assert sum(counts.tried[0, 0]) == int(stats.positions["decided"].sum())
    assert sum(counts.accepted[0, 0]) == int(stats.accepted.sum())
    assert torch.equal(result.passes[:, 0], stats.drafter_calls)
    plain = generate(drafter, verifier, inputs, "lossless", max_new_tokens=12)
    assert plain.reviews is plain.passes is None
