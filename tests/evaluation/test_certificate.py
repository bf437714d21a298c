"""Validity of the certificate by simulation, and its refusals."""

import numpy as np
import pytest
from scipy.stats import binom

from deferral_train.errors import InputError
from deferral_train.evaluation.certificate import (
    betting_p_value,
    fixed_sequence,
    prompts_needed,
    smallest_certifiable,
)

DRAWS = 1000


def tolerated(delta: float) -> int:
    """Violations that a valid procedure exceeds with probability at most 1%."""
    return int(binom.ppf(0.99, DRAWS, delta))


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_certified_settings_break_the_limit_no_more_often_than_promised(confidence: float) -> None:
    """Exact-match differences in {-1, 0, 1} from a population whose mean loss per setting is known.

    The first setting that is too risky sits just above the limit, the worst case for the guarantee.
    """
    limit, n = 0.05, 250
    harms, gains = np.array([0.01, 0.04, 0.0705, 0.12]), np.array([0.005, 0.01, 0.02, 0.02])
    risky = harms - gains > limit
    assert list(risky) == [False, False, True, True]
    generator = np.random.default_rng(7)
    violations = useful = 0
    for _ in range(DRAWS):
        uniform = generator.random((4, n))
        losses = (uniform < harms[:, None]).astype(float) - (uniform > 1 - gains[:, None])
        certified = fixed_sequence(losses, limit, confidence, low=-1, high=1).certified
        violations += certified > 2
        useful += certified >= 1
    assert violations <= tolerated(1 - confidence)
    assert useful > 0.7 * DRAWS


def test_valid_on_a_pool_resampled_with_replacement() -> None:
    """A pool of bounded, skewed losses treated as the population; the limit is just below its mean."""
    pool = np.random.default_rng(1).beta(0.15, 3.0, size=700)
    generator = np.random.default_rng(2)
    limit = pool.mean() * 0.999
    draws = pool[generator.integers(0, 700, size=(DRAWS, 300))]
    violations = sum(betting_p_value(row, limit) <= 0.05 for row in draws)
    assert violations <= tolerated(0.05)


def test_the_sequence_stops_at_the_first_failure() -> None:
    losses = np.zeros((3, 400))
    losses[1] = 1.0
    certificate = fixed_sequence(losses, 0.05)
    assert certificate.certified == 1
    assert len(certificate.p_values) == 2  # the third, though harmless, is never looked at


def test_smallest_certifiable_is_what_all_zero_losses_certify() -> None:
    for low in (0.0, -1.0):
        smallest = smallest_certifiable(300, 0.95, low, 1.0)
        assert fixed_sequence(np.zeros((1, 300)), smallest * 1.001, low=low).certified == 1
        assert fixed_sequence(np.zeros((1, 300)), smallest * 0.999, low=low).certified == 0
        assert prompts_needed(smallest * 1.001, 0.95, low, 1.0) <= 300


def test_adapts_to_rare_differences_where_hoeffding_cannot() -> None:
    """1,000 prompts on which the rule never differs certify 0.5%; Hoeffding's limit on [-1, 1] would be
    7.7%.
    """
    assert smallest_certifiable(1000, 0.95, -1.0, 1.0) < 0.005
    assert 2 * np.sqrt(np.log(20) / 2000) > 0.07


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"losses must lie in \[0.0, 1.0\]"):
        betting_p_value(np.array([0.0, 1.5]), 0.1)
    with pytest.raises(InputError, match="confidence"):
        fixed_sequence(np.zeros((1, 10)), 0.1, confidence=1.0)
    assert betting_p_value(np.zeros(100), 0.0) == 1.0
