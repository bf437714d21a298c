"""The K matrix: what it promises about lengths, and what is refused in one line."""

from __future__ import annotations

import pytest
import torch

from deferral_train.decoding.drafting.plan import DraftCascade, Plan
from deferral_train.errors import InputError

PUBLISHED = [[5, 14, 10], [0, 1, 10], [0, 0, 10]]


def test_longest_drafts_count_what_reviews_overshoot() -> None:
    assert Plan([[10]]).longest == (10,)
    assert Plan([[5, 0], [0, 0]], max_gram=None).longest == (5, 0)
    # The last drafter hands on up to 10 + 1; asked for 5, it may stop at 4 + 11.
    assert Plan([[5, 0], [0, 10]]).longest == (15, 10)
    assert Plan(PUBLISHED).longest == (29, 11, 10)
    assert Plan(PUBLISHED).one_hot_tail
    assert Plan(PUBLISHED).reviewing == (0, 1)


@pytest.mark.parametrize(
    ("k", "words"),
    [
        ([[1, 2]], "must be square"),
        ([[1, 2], [0]], "must be square"),
        ([], "must be square"),
        ([[1, 0], [1, 1]], "0 below the diagonal"),
        ([[-1]], "give whole numbers"),
        ([[1.5]], "give whole numbers"),
        ([[True]], "give whole numbers"),
        ([[0, 0], [0, 3]], "first row of 0"),
        ([[0, 4], [0, 3]], "drafter 1 is never asked"),
    ],
)
def test_a_matrix_that_cannot_be_meant_is_refused(k, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        Plan(k)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lenience", [0.5, 0, -1, float("inf"), float("nan"), "2", True])
def test_lenience_below_one_is_refused(lenience) -> None:
    with pytest.raises(InputError, match=r"lenience is .*at least 1"):
        Plan([[3]], lenience=lenience)


def test_max_gram_must_be_there_when_asked() -> None:
    with pytest.raises(InputError, match="max_gram is None"):
        Plan([[3]], max_gram=None)


def test_drafters_must_fit_the_matrix_and_be_in_order() -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(9, 9)
    plan = Plan([[2, 1, 0], [0, 1, 0], [0, 0, 4]])
    assert DraftCascade([large, small], plan).drafters == (large, small)
    with pytest.raises(InputError, match="give the largest first"):
        DraftCascade([small, large], plan)
    with pytest.raises(InputError, match=r"k has 3 rows for 1 drafter.*2 x 2"):
        DraftCascade([large], plan)
