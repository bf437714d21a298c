import numpy as np
import pytest

from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import MIN_PROMPTS, PromptBootstrap


def test_sums_are_weighted_sums_and_keep_rounding_small() -> None:
    bootstrap = PromptBootstrap(40, replicates=50, seed=3)
    values = np.random.default_rng(0).normal(1e4, 1.0, size=(3, 40))
    exact = values @ bootstrap.weights.T.astype(np.float64)
    np.testing.assert_allclose(bootstrap.sums(values), exact, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(bootstrap.weights.sum(axis=1), 40)


def test_interval_of_a_mean_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = PromptBootstrap(400, replicates=4000, seed=0).mean(values)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_ratio_resamples_both_parts_together() -> None:
    tokens = np.random.default_rng(2).integers(1, 200, size=50).astype(float)
    interval = PromptBootstrap(50, replicates=200).ratio(0.25 * tokens, tokens)
    assert interval.low == pytest.approx(0.25, abs=1e-6)
    assert interval.high == pytest.approx(0.25, abs=1e-6)


def test_same_seed_same_interval_other_seed_another() -> None:
    values = np.random.default_rng(3).normal(size=60)
    first, again, other = (PromptBootstrap(60, 100, seed=seed).mean(values) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_no_replicates_no_limits() -> None:
    assert PromptBootstrap(2, replicates=0).mean(np.array([1.0, 2.0])).as_dict() == {
        "value": 1.5,
        "low": None,
        "high": None,
    }


def test_too_few_prompts_are_refused_with_the_number_needed() -> None:
    with pytest.raises(InputError, match=f"at least {MIN_PROMPTS} prompts, these traces hold 3"):
        PromptBootstrap(3)
    with pytest.raises(InputError, match="confidence must lie between 0 and 1, got 95"):
        PromptBootstrap(30, confidence=95)
