"""The speed model: published test values, closed forms against each other, and against Monte-Carlo."""

from __future__ import annotations

import itertools
import random

import pytest
from drafting.ewif import ewif_horizontal, ewif_plain, ewif_vertical

from deferral_train.decoding.drafting.plan import MaxGram, Plan
from deferral_train.decoding.drafting.speed import expect
from deferral_train.errors import InputError


def test_values_of_leviathans_greedy_t5_table() -> None:
    """EN-DE (.80, .75) and CNN/DM (.73, .65) with costs .04 and .02."""
    for (large, small), best in {
        (0.80, 0.75): [(3.282, 9), (3.199, 9), (3.415, 4, 6)],
        (0.73, 0.65): [(2.660, 7), (2.426, 7), (2.720, 4, 3)],
    }.items():
        (one, k1), (two, k2), (both, first, second) = best
        assert ewif_plain(large, k1, 0.04) == pytest.approx(one, abs=6e-4)
        assert ewif_plain(small, k2, 0.02) == pytest.approx(two, abs=6e-4)
        mixed = ewif_horizontal([large] * first + [small] * second, [0.04] * first + [0.02] * second)
        assert mixed == pytest.approx(both, abs=6e-4)
        # These k are the best ones.
        assert ewif_plain(large, k1, 0.04) == max(ewif_plain(large, k, 0.04) for k in range(30))


def test_closed_forms_agree_where_they_meet() -> None:
    assert ewif_vertical(0.8, 0.5, 4, 0, (0.1, 0.01)) == pytest.approx(ewif_plain(0.8, 4, 0.1))
    assert ewif_horizontal([0.7] * 3, [0.1] * 3) == pytest.approx(ewif_plain(0.7, 3, 0.1))
    assert ewif_vertical(1.0, 1.0, 1, 3, (0.0, 0.0)) == pytest.approx(5.0)
    plain = expect(Plan([[4, 0], [0, 0]], max_gram=None), {(0, 0): [0.8]}, [0.1])
    assert plain.ewif == pytest.approx(ewif_plain(0.8, 4, 0.1))
    assert plain.passes == (4.0,)
    horizontal = expect(
        Plan([[4, 6, 0], [0, 0, 0], [0, 0, 0]], max_gram=None), {(0, 0): [0.8], (0, 1): [0.75]}, [0.04, 0.02]
    )
    assert horizontal.ewif == pytest.approx(ewif_horizontal([0.8] * 4 + [0.75] * 6, [0.04] * 4 + [0.02] * 6))
    # One review of three tokens of Max-Gram is one run of the vertical theorem.
    vertical = expect(Plan([[1, 0], [0, 3]]), {(0, 0): [0.8], (1, 1): [0.6]}, [0.1], max_gram_cost=0.03)
    assert vertical.ewif == pytest.approx(ewif_vertical(0.8, 0.6, 1, 3, (0.1, 0.01)))


def simulated_vertical(outer: float, inner: float, runs: int, tokens: int, rounds: int) -> float:
    """Tokens per verifier pass, by coin tosses."""
    toss = random.Random(5)
    total = 0
    for _ in range(rounds):
        drafted = sum(1 + accepted(toss, [inner] * tokens) for _ in range(runs))
        total += 1 + accepted(toss, [outer] * drafted)
    return total / rounds


def accepted(toss: random.Random, chances: list[float]) -> int:
    return len(list(itertools.takewhile(lambda chance: toss.random() < chance, chances)))


def test_the_vertical_theorem_against_coin_tosses() -> None:
    for outer, inner, runs, tokens in ((0.8, 0.5, 3, 4), (0.95, 0.7, 2, 6), (0.5, 0.9, 4, 2)):
        found = simulated_vertical(outer, inner, runs, tokens, 20_000)
        assert ewif_vertical(outer, inner, runs, tokens, (0.0, 0.0)) == pytest.approx(found, rel=0.03)


class Simulation:
    """A K matrix by coin tosses: sources of a draft's tokens, and passes, drawn step by step."""

    def __init__(self, k, rates, seed: int) -> None:
        self.k, self.rates, self.toss = k, rates, random.Random(seed)
        self.passes = [0] * (len(k) - 1)

    def draft(self, reviewer: int) -> list[int]:
        sources: list[int] = []
        goal = 0
        for source in range(reviewer, len(self.k)):
            if self.k[reviewer][source] == 0:
                continue
            goal += self.k[reviewer][source]
            while len(sources) < goal:
                if source == len(self.k) - 1:
                    sources += [source] * (goal - len(sources))
                else:
                    self.passes[source] += 1
                    sources += [source] * (1 + self.review(source + 1))
        return sources

    def review(self, reviewer: int) -> int:
        chances, run = [], 0
        sources = self.draft(reviewer)
        for place, source in enumerate(sources):
            run = run + 1 if place and sources[place - 1] == source else 0
            rates = self.rates[reviewer, source]
            chances.append(rates[min(run, len(rates) - 1)])
        return accepted(self.toss, chances)


@pytest.mark.parametrize(
    ("k", "rates"),
    [
        ([[5, 0], [0, 6]], {(0, 0): [0.9, 0.8], (1, 1): [0.4, 0.8, 0.9]}),
        ([[3, 5], [0, 4]], {(0, 0): [0.85], (0, 1): [0.3, 0.9], (1, 1): [0.5]}),
        (
            [[4, 3, 5], [0, 2, 3], [0, 0, 4]],
            {
                (0, 0): [0.9],
                (0, 1): [0.7, 0.8],
                (0, 2): [0.5],
                (1, 1): [0.8],
                (1, 2): [0.6],
                (2, 2): [0.7, 0.9],
            },
        ),
    ],
)
def test_any_matrix_against_coin_tosses(k, rates) -> None:
    rounds, simulation = 8_000, Simulation(k, rates, seed=2)
    tokens = sum(1 + simulation.review(0) for _ in range(rounds)) / rounds
    found = expect(Plan(k, max_gram=MaxGram()), rates, [0.1] * (len(k) - 1))
    assert found.tokens == pytest.approx(tokens, rel=0.03)
    for expected, counted in zip(found.passes, simulation.passes):
        assert expected == pytest.approx(counted / rounds, rel=0.03)
    assert found.ewif == pytest.approx(found.tokens / (1 + 0.1 * sum(found.passes)))


def test_what_was_not_measured_is_refused() -> None:
    plan = Plan([[2, 0], [0, 2]])
    with pytest.raises(InputError, match="source 1 by reviewer 1 is not known"):
        expect(plan, {(0, 0): [0.5]}, [0.1])
    with pytest.raises(InputError, match="costs has 2 entries"):
        expect(plan, {(0, 0): [0.5], (1, 1): [0.5]}, [0.1, 0.2])
