"""Acceptance by block and by place, against blocks laid out by hand."""

from __future__ import annotations

import pytest

from deferral_train.evaluation.acceptance import acceptance_by_length, acceptance_by_place, block_lengths
from deferral_train.rules.verify import Origin

KEPT, ACCEPTED, RESAMPLED, BONUS = Origin.KEPT, Origin.ACCEPTED, Origin.RESAMPLED, Origin.BONUS
ROW = [ACCEPTED, KEPT, RESAMPLED, RESAMPLED, KEPT, KEPT, KEPT, BONUS, ACCEPTED]


def test_blocks_end_with_the_verifiers_own_token_and_a_cut_one_is_left_out():
    assert block_lengths({"origin": ROW, "counts": {"verifier_calls": 4}}) == [3, 1, 4]
    assert block_lengths({"origin": ROW[:-1], "counts": {"verifier_calls": 3}}) == [3, 1, 4]
    assert block_lengths({"origin": ROW, "counts": {"verifier_calls": 9}}) is None
    assert block_lengths({"origin": [KEPT] * 3, "counts": {"verifier_calls": 0}}) is None


def test_by_length_as_the_benchmark_counts():
    histogram, conditional, joint = acceptance_by_length([3, 1, 4, 1])
    assert histogram == {1: 2, 3: 1, 4: 1}
    assert joint == {1: 1.0, 3: 0.5, 4: 0.25}
    assert conditional == {1: 1.0, 3: 0.5, 4: 0.5}


def test_by_place_only_where_something_was_decided():
    found = acceptance_by_place({"accepted": [8, 3, 0, 0], "decided": [10, 6, 3, 0]})
    assert found["conditional"] == [0.8, 0.5, 0.0]
    assert found["marginal"] == pytest.approx([0.8, 0.4, 0.0])
    # Where every block is drafted whole, the mean length is one more than the sum of the marginals.
    lengths = [1, 1, 2, 3, 3]
    decided = [5, 3, 2]
    accepted = [3, 2, 0]
    marginal = acceptance_by_place({"accepted": accepted, "decided": decided})["marginal"]
    assert 1 + sum(marginal) == pytest.approx(sum(lengths) / len(lengths))
