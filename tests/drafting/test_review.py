"""Distribution of leniently reviewed tokens: enumeration in float64 against the formula, samples against both."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from deferral_train.decoding.drafting.review import review_greedy, review_sampled, reviewed_distribution

FAILURE = 1e-6  # probability that a chi-square test here fails by chance, were its seed not fixed


def distribution_of(weights: list[int]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def enumerated(q: list[float], p: list[float], lenience: float) -> list[float]:
    """Every way by which a token comes out: proposed and let through, or drawn in place of any other."""
    size = len(q)
    emitted = [0.0] * size
    for proposed in range(size):
        if q[proposed] == 0:
            continue
        stands = min(1.0, lenience * p[proposed] / q[proposed])
        emitted[proposed] += q[proposed] * stands
        excess = [max(0.0, p[v] - q[v]) for v in range(size)]
        total = math.fsum(excess)
        for v in range(size):
            emitted[v] += q[proposed] * (1 - stands) * (excess[v] / total if total else 0.0)
    return emitted


WEIGHTS = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


@given(WEIGHTS, WEIGHTS, st.sampled_from([1.0, 1.5, 2.0, 5.0, 100.0]))
def test_the_formula_is_what_comes_out(q_weights, p_weights, lenience) -> None:
    q, p = distribution_of(q_weights), distribution_of(p_weights)
    found = reviewed_distribution(
        torch.tensor(q, dtype=torch.float64), torch.tensor(p, dtype=torch.float64), lenience
    )
    assert found.tolist() == pytest.approx(enumerated(q, p, lenience), abs=1e-12)
    assert float(found.sum()) == pytest.approx(1.0)


Q, P = [0.55, 0.25, 0.15, 0.05, 0.0], [0.1, 0.2, 0.3, 0.15, 0.25]


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("lenience", [1.0, 2.0, 5.0])
def test_samples_follow_the_distribution(lenience: float, one_hot: bool) -> None:
    rows, generator = 20_000, torch.Generator().manual_seed(4)
    p = torch.tensor(P)
    q = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0] if one_hot else Q)
    drafted = torch.multinomial(q, rows, replacement=True, generator=generator)[:, None]
    review = review_sampled(
        drafted,
        None if one_hot else q.expand(rows, 1, -1),
        p.expand(rows, 2, -1),
        torch.ones(rows, dtype=torch.int64),
        lenience,
        generator,
    )
    first = torch.where(review.accepted == 1, drafted[:, 0], review.next_token)
    counts = torch.bincount(first, minlength=5)
    distribution = torch.tensor(enumerated(q.tolist(), P, lenience), dtype=torch.float64)
    assert int(counts[distribution < 1e-12].sum()) == 0
    seen, wanted = (
        counts[distribution > 1e-12].tolist(),
        (distribution[distribution > 1e-12] / distribution.sum() * rows).tolist(),
    )
    assert len(seen) < 2 or stats.chisquare(seen, wanted).pvalue > FAILURE
    if lenience > 1:  # the reviewer's own distribution is another one, so that the check above can fail
        assert (distribution - p).abs().sum() / 2 > 0.05
    own = torch.bincount(review.next_token[review.accepted == 1], minlength=5)
    assert (
        stats.chisquare(own.tolist(), (p.double() / p.double().sum() * own.sum()).tolist()).pvalue > FAILURE
    )


def test_rows_review_what_they_were_given() -> None:
    p = torch.eye(3)[[0, 1, 2, 0]][None].expand(3, -1, -1)
    drafted = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 2, 1]])
    lengths = torch.tensor([3, 1, 3])
    review = review_sampled(drafted, None, p, lengths, 1.0, torch.Generator().manual_seed(0))
    assert review.accepted.tolist() == [3, 1, 1]
    assert review.next_token.tolist() == [0, 1, 1]
    greedy = review_greedy(drafted, None, p * 10, lengths, 1.0)
    assert greedy.accepted.tolist() == [3, 1, 1]
    assert greedy.next_token.tolist() == [0, 1, 1]


def test_greedy_lenience_compares_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()[None, None].expand(1, 2, -1)
    one = torch.tensor([1])
    for token, proposed, lenience, stands in (
        (1, 0.55, 2.0, True),  # 2 * 0.3 > 0.55
        (1, 0.65, 2.0, False),
        (2, 1.0, 4.9, False),  # one-hot proposal: only above 1/l
        (2, 1.0, 5.1, True),
        (0, 1.0, 1.0, True),  # the argmax
    ):
        review = review_greedy(torch.tensor([[token]]), torch.tensor([[proposed]]), logits, one, lenience)
        assert review.accepted.tolist() == [int(stands)], (token, proposed, lenience)
        assert review.next_token.tolist() == [0]
