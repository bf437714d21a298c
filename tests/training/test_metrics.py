"""Metrics against independent NumPy and scikit-learn computations, batch by batch and accumulated."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, roc_auc_score

from deferral_train.errors import InputError
from deferral_train.training import metrics as m

ALPHAS = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    n = 3000
    gap, tv = rng.uniform(-1, 1, n), rng.uniform(0, 1, n)
    guess = gap + 0.3 * rng.standard_normal(n)
    z = rng.choice([-1.0, 0.0, 1.0], n)
    position = rng.integers(0, 30, n)
    return {"gap": gap, "tv": tv, "guess": guess, "z": z, "position": position}


def tensors(data, rows=slice(None)):
    return {name: torch.from_numpy(np.ascontiguousarray(column[rows])) for name, column in data.items()}


def defers(part):
    return m.defer_at(part["guess"], part["tv"], torch.tensor(ALPHAS))


def blocks(n=3000):
    edges = [0, 1, 1000, 1007, n]
    return [slice(a, b) for a, b in pairwise(edges)]


def brute_regret(gap, tv, guess, alpha):
    total = 0.0
    for g, t, e in zip(gap, tv, guess):
        risk = {False: 0.0, True: alpha * t - g}  # L_spec up to a constant
        total += risk[bool(e > np.float32(alpha) * t)] - min(risk.values())
    return total / len(gap)


def test_regret_per_alpha_and_bucket(data):
    metric = m.Regret(ALPHAS)
    for rows in blocks():
        part = tensors(data, rows)
        metric.update(part["gap"], part["tv"], defers(part), part["position"])
    wanted = [brute_regret(data["gap"], data["tv"], data["guess"], a) for a in ALPHAS]
    np.testing.assert_allclose(metric.per_alpha(), wanted, rtol=1e-9)
    np.testing.assert_allclose(metric.compute(), np.mean(wanted), rtol=1e-9)
    for bucket, (low, high) in enumerate([(0, 4), (4, 8), (8, 16), (16, 99)]):
        rows = (data["position"] >= low) & (data["position"] < high)
        inside = [brute_regret(*(data[k][rows] for k in ("gap", "tv", "guess")), a) for a in ALPHAS]
        np.testing.assert_allclose(metric.per_bucket()[bucket], np.mean(inside), rtol=1e-9)


def test_regret_of_the_optimal_rule_is_zero_and_never_negative(data):
    part = tensors(data)
    metric = m.Regret(ALPHAS)
    best = m.defer_at(part["gap"], part["tv"], torch.tensor(ALPHAS, dtype=torch.float64))
    metric.update(part["gap"], part["tv"], best, part["position"])
    assert metric.compute() == 0
    metric.update(part["gap"], part["tv"], ~best, part["position"])
    assert (metric.per_alpha() > 0).all()


def test_excess_risk_is_the_difference_of_two_risks(data):
    part = tensors(data)
    ours, base = defers(part), m.defer_at(part["gap"], part["tv"], torch.tensor(ALPHAS))
    metric = m.ExcessRisk(ALPHAS)
    for rows in blocks():
        cut = {k: v[rows] for k, v in part.items()}
        metric.update(cut["z"], cut["tv"], ours[rows], base[rows], cut["position"])
    z, tv = data["z"], data["tv"]

    def risk(decided, alpha):
        return np.where(decided, alpha * tv, z).mean()  # E (1-r) l_q + r (l_p + alpha tv), l_p cancels

    wanted = [risk(ours[:, i].numpy(), a) - risk(base[:, i].numpy(), a) for i, a in enumerate(ALPHAS)]
    np.testing.assert_allclose(metric.per_alpha(), wanted, rtol=1e-9, atol=1e-12)


def test_rates_and_disagreement(data):
    part = tensors(data)
    ours, base = defers(part), m.defer_at(part["gap"], part["tv"], torch.tensor(ALPHAS))
    rejection, relative, differ = m.RejectionRate(ALPHAS), m.RelativeRisk(ALPHAS), m.Disagreement(ALPHAS)
    rejection.update(part["tv"], ours, part["position"])
    relative.update(part["z"], ours, part["position"])
    differ.update(ours, base, part["position"])
    decided = ours.numpy()
    np.testing.assert_allclose(rejection.per_alpha(), (decided * data["tv"][:, None]).mean(0))
    np.testing.assert_allclose(relative.per_alpha(), (decided * -data["z"][:, None]).mean(0))
    np.testing.assert_allclose(differ.per_alpha(), (decided != base.numpy()).mean(0))


def test_auroc_against_scikit_learn_with_ties():
    rng = np.random.default_rng(1)
    score = np.round(rng.uniform(-1, 1, 4000), 2) + 0.005  # on bin centres: exact
    label = rng.random(4000) < (score + 1) / 2
    metric = m.BinnedAUROC(bins=200)
    for rows in (slice(0, 7), slice(7, 4000)):
        metric.update(torch.from_numpy(score[rows]), torch.from_numpy(label[rows]))
    np.testing.assert_allclose(metric.compute(), roc_auc_score(label, score), rtol=1e-9)
    assert torch.isnan(m.auroc(torch.zeros(2, 5)))


def test_calibration_against_brute_force_and_scikit_learn():
    rng = np.random.default_rng(2)
    p = rng.random(2000)
    y = (rng.random(2000) < p**2).astype(float)
    metric = m.Calibration(0.0, 1.0, bins=10)
    for rows in (slice(0, 3), slice(3, 2000)):
        metric.update(torch.from_numpy(p[rows]), torch.from_numpy(y[rows]))
    bins = np.minimum((p * 10).astype(int), 9)
    ece = sum(abs(p[bins == b].sum() - y[bins == b].sum()) for b in range(10)) / 2000
    found = metric.compute()
    np.testing.assert_allclose(found["ece"], ece)
    np.testing.assert_allclose(found["brier"], brier_score_loss(y, p))
    predicted, label, count = metric.reliability()
    assert count.sum() == 2000
    np.testing.assert_allclose(predicted[3], p[bins == 3].mean())
    np.testing.assert_allclose(label[3], y[bins == 3].mean())


def test_states_count_beyond_what_float32_can():
    metric = m.RejectionRate((0.0,))
    assert metric.total.dtype == torch.float64
    assert metric.count.dtype == torch.int64
    metric.count += 2**24
    metric.update(torch.ones(1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.long))
    assert metric.count.sum() == 4 * 2**24 + 1


@pytest.mark.parametrize("grid", [[], [float("nan")], [0.5, 0.1], [0.1, 0.1], [float("inf")], [99.0]])
def test_alpha_grid_out_of_range_is_refused(grid):
    with pytest.raises(InputError, match="alpha grid"):
        m.check_alphas(grid)
