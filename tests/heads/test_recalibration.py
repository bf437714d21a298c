import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from deferral_train.heads.recalibration import (
    Recalibration,
    fit_platt,
    fit_temperature,
    interpolate,
    isotonic,
    temper,
)


def overconfident(rows=4000, vocab=7, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(rows, vocab, generator=generator).mul(1.5)
    gold = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0]
    return (scale * true).log_softmax(-1), gold


def test_distribution_temperature_undoes_a_doubling():
    logs, gold = overconfident()
    tail = torch.zeros(len(gold))
    found = fit_temperature(logs, tail, gold, 7)
    oracle = minimize_scalar(
        lambda t: torch.nn.functional.cross_entropy(logs.double() / t, gold).item(),
        bounds=(0.3, 6),
        method="bounded",
    ).x
    assert abs(found - oracle) < 1e-3
    assert 1.8 < found < 2.2


def test_distribution_temperature_from_the_top_half_is_near():
    logs, gold = overconfident()
    top = logs.topk(4, dim=-1)
    hit = top.indices == gold.unsqueeze(-1)
    place = torch.where(hit.any(-1), hit.int().argmax(-1), torch.full_like(gold, -1))
    tail = 1 - top.values.exp().sum(-1)
    assert abs(fit_temperature(top.values, tail, place, 7) - 2) < 0.3


def test_temper_is_softmax_of_scaled_logits_when_all_is_logged():
    logs, _ = overconfident(rows=20)
    wanted = (logs.double() / 1.7).log_softmax(-1)
    torch.testing.assert_close(temper(logs, torch.zeros(20), 7, 1.7), wanted)


def test_platt_against_scikit_learn():
    logs, gold = overconfident()
    right, confidence = gold == logs.argmax(-1), logs.exp().amax(-1)
    slope, bias = fit_platt(confidence, right)
    odds = torch.logit(confidence.double(), eps=1e-6).numpy()[:, None]
    wanted = LogisticRegression(C=1e9, tol=1e-10).fit(odds, right.numpy())
    np.testing.assert_allclose(
        [slope, bias], [wanted.coef_[0, 0], wanted.intercept_[0]], rtol=1e-3, atol=1e-4
    )
    assert slope < 0.9  # overconfident: odds are drawn together


def test_isotonic_against_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.choice(np.linspace(0, 1, 80), 500)
    y = (rng.random(500) < x**2).astype(float)
    knots, fitted = isotonic(x, y)
    wanted = IsotonicRegression().fit(x, y).predict(knots)
    np.testing.assert_allclose(fitted, wanted, atol=1e-12)


def test_interpolation_against_numpy():
    knots = torch.tensor([0.0, 0.2, 0.5, 1.0])
    values = torch.tensor([0.1, 0.1, 0.7, 0.9])
    x = torch.linspace(-0.2, 1.2, 57)
    wanted = np.interp(x.numpy(), knots.numpy(), values.numpy())
    np.testing.assert_allclose(interpolate(x, knots, values).numpy(), wanted, atol=1e-6)


def test_recalibration_brings_confidence_near_accuracy():
    logs, gold = overconfident(rows=20_000)
    confidence, right = logs.exp().amax(-1), gold == logs.argmax(-1)
    before = (confidence.mean() - right.float().mean()).abs()
    for kind in ("platt", "isotonic"):
        layer = Recalibration(kind)
        layer.fit((confidence, right), (confidence, right))
        for which in (0, 1):
            after = layer(confidence, which)
            assert (after.mean() - right.float().mean()).abs() < 0.02 < before
            order = confidence.argsort()
            assert (after[order].diff() >= -1e-6).all()
