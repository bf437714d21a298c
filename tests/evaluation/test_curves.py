import numpy as np
import pytest

from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.curves import Curve, area_difference, at_share, differences

NONE = np.zeros((0, 0))


def curve(x: list[float], y: list[float]) -> Curve:
    return Curve("rule", np.array(x), np.array(y), np.zeros((len(x), 0)), np.zeros((len(x), 0)))


def test_share_runs_from_the_drafter_end_to_the_lossless_end() -> None:
    values, redrawn = curve([0.0, 0.1, 0.4], [0.5, 0.3, 0.2]).at([0, 0.25, 0.625, 1])
    np.testing.assert_allclose(values, [0.5, 0.3, 0.25, 0.2])
    assert redrawn.shape == (4, 0)


def test_order_of_dial_points_does_not_matter_and_equal_costs_are_averaged() -> None:
    shuffled = at_share(
        np.array([0.0, 0.2, 0.1, 0.2, 0.4]), np.array([1.0, 0.4, 0.7, 0.6, 0.0]), np.array([0.5])
    )
    np.testing.assert_allclose(shuffled, [0.5])


def test_area_of_a_straight_line_is_its_middle() -> None:
    assert curve([0.0, 0.4], [0.6, 0.2]).area()[0] == pytest.approx(0.4)


def test_models_that_agree_everywhere_have_one_value() -> None:
    np.testing.assert_allclose(curve([0.0, 0.0], [0.3, 0.3]).at([0.2, 0.9])[0], 0.3)


def test_paired_difference_is_tighter_than_the_curves_themselves() -> None:
    """Two rules that differ by exactly 0.01 on every prompt: the interval of the difference has no width."""
    bootstrap = PromptBootstrap(50, 300)
    generator = np.random.default_rng(0)
    risk = generator.uniform(0.2, 0.8, size=(3, 50))
    cost = np.array([0.0, 0.1, 0.2])[:, None] * np.ones(50)
    curves = [
        Curve(name, cost.mean(1), value.mean(1), bootstrap.sums(cost) / 50, bootstrap.sums(value) / 50)
        for name, value in (("a", risk), ("b", risk - 0.01))
    ]
    for interval in [
        *differences(curves[1], curves[0], bootstrap),
        area_difference(curves[1], curves[0], bootstrap),
    ]:
        assert interval.value == pytest.approx(-0.01)
        assert interval.high - interval.low < 1e-6
