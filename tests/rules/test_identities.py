"""Identities between rules' output distributions, and the lemmas, on random draws."""

from __future__ import annotations

import pytest
import torch

from deferral_train.rules import make_rule, summarize
from deferral_train.rules.emission import expected_tokens_per_call, keep_distribution, rejection_mass
from deferral_train.rules.risks import lemma5_bound, regret
from deferral_train.testing import cases

GREEDY = [case for case in cases(seed=11, positions=30) if case.temperature == 0 and "top" not in case.name]
# With the verifier masking nothing; a mask overrides what a rule keeps.
WHOLE = [c for c in cases(seed=11, positions=30) if c.temperature > 0 and bool((c.verifier > -torch.inf).all())
         and "top" not in c.name]  # fmt: skip
RANDOM = [case for case in cases(seed=11, positions=30) if case.temperature > 0 and "top" not in case.name]


def distribution(name, case, **parameters):
    return make_rule(name, **parameters).target(case.drafter, case.verifier, case.temperature)


@pytest.mark.parametrize("alpha", [-1.0, -0.6, -0.11, 0.0, 0.13, 0.57, 1.0])
def test_opt_diff_and_v1_agree_at_temperature_zero(alpha):
    for case in GREEDY:
        diff = distribution("diff", case, alpha=alpha)
        assert torch.equal(distribution("opt", case, alpha=alpha), diff), case.name
        assert torch.equal(distribution("token_v1", case, alpha=alpha), diff), case.name


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.75, 1.0])
def test_v3_at_temperature_zero_is_greedy_lenience(alpha):
    """Leviathan's greedy lenience: the drafted argmax stands iff p(v_q) >= (1 - alpha) max p."""
    for case in GREEDY:
        p = torch.softmax(case.verifier, dim=-1)
        v_q, v_p = case.drafter.argmax(-1), case.verifier.argmax(-1)
        stands = p.gather(-1, v_q[:, None])[:, 0] >= (1 - alpha) * p.amax(-1)
        stands &= case.verifier.gather(-1, v_q[:, None])[:, 0] > -torch.inf  # masked tokens are never emitted
        emitted = torch.where(stands, v_q, v_p)
        # A tie is the lowest index for both models, as torch's max gives it on CPU.
        assert torch.equal(distribution("token_v3", case, alpha=alpha).argmax(-1), emitted), case.name


@pytest.mark.parametrize("name", ["lossy", "lenient"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_lossy_and_lenient_are_lossless_at_temperature_zero(name, alpha):
    for case in GREEDY:
        assert torch.equal(distribution(name, case, alpha=alpha), distribution("lossless", case)), case.name


def test_lossy_and_lenient_differ_where_beta_matters():
    q, p = (
        torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log(),
        torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log(),
    )
    lossy = make_rule("lossy", alpha=0.4).target(q, p)
    lenient = make_rule("lenient", alpha=0.4).target(q, p)
    assert float((lossy - lenient).abs().max()) > 0.01


def test_lossy_keeps_the_drafter_where_no_rejection_mass_is_left():
    q, p = (
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(),
        torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64).log(),
    )
    torch.testing.assert_close(make_rule("lossy", alpha=0.5).target(q, p), q.exp(), atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", ["chow", "diff", "opt", "opt_verifier", "bild", "fuzzy"])
def test_rejection_is_r_times_tv(name):
    for case in WHOLE:
        rule = make_rule(name)
        summary = summarize(case.drafter, case.verifier, temperature=case.temperature)
        pi = rule.target(case.drafter, case.verifier, case.temperature)
        q = torch.softmax(case.drafter / case.temperature, dim=-1)
        expected = rule.defer(summary) * summary.tv
        torch.testing.assert_close(rejection_mass(pi, q), expected, atol=1e-14, rtol=0)


def test_ensemble_and_biased_reject_their_share_of_tv():
    for case in WHOLE:
        q = torch.softmax(case.drafter / case.temperature, dim=-1)
        tv = summarize(case.drafter, case.verifier, temperature=case.temperature).tv
        for name, parameters, share in (("ensemble", {"weight": 0.3}, 0.3), ("biased", {"bias": 0.3}, 0.7)):
            rejected = rejection_mass(distribution(name, case, **parameters), q)
            torch.testing.assert_close(rejected, share * tv, atol=1e-14, rtol=0)


def test_expected_tokens_per_call_against_enumeration():
    for rate in (0.0, 0.35, 0.8, 1.0):
        for drafted in (0, 1, 5):
            chain = (
                sum((k + 1) * rate**k * (1 - rate) for k in range(drafted)) + (drafted + 1) * rate**drafted
            )
            assert expected_tokens_per_call(rate, drafted) == pytest.approx(chain, abs=1e-12)
    rates = torch.tensor([0.2, 0.9], dtype=torch.float64)
    closed = (1 - rates**6) / (1 - rates)
    torch.testing.assert_close(expected_tokens_per_call(rates, 5), closed, atol=1e-14, rtol=0)


def test_chow_ends():
    for case in [*GREEDY, *RANDOM]:
        assert torch.equal(distribution("chow", case, alpha=0.0), distribution("lossless", case))
        assert torch.equal(distribution("chow", case, alpha=1.0), distribution("drafter_only", case))


def test_lemma_5_on_a_hundred_thousand_draws():
    generator = torch.Generator().manual_seed(17)
    weights = torch.rand(3, 100_000, 6, generator=generator, dtype=torch.float64)
    q, p, truth = (weights.clamp(min=1e-12).log() * -1).pow(3).unbind(0)
    q, p, truth = (x / x.sum(-1, keepdim=True) for x in (q, p, truth))
    tv = (p - q).clamp(min=0).sum(-1)
    gap = truth.gather(-1, p.argmax(-1, keepdim=True)) - truth.gather(-1, q.argmax(-1, keepdim=True))
    closest = 0.0
    for alpha in (-0.7, 0.0, 0.25, 1.0):
        defer = make_rule("opt", alpha=alpha).defer(
            summarize(q.log(), p.log(), fields=["drafter_max", "verifier_max", "tv"])
        )
        excess = regret(gap.squeeze(-1), tv, defer, alpha)
        bound = lemma5_bound(q, p, truth)
        assert bool((excess <= bound + 1e-12).all())
        closest = max(closest, float((excess / bound).max()))
    assert closest > 0.5, "the draws should come near the bound, or the test says little"


def test_v3_at_alpha_zero_is_not_lossless():
    q, p = (
        torch.tensor([0.9, 0.1], dtype=torch.float64).log(),
        torch.tensor([0.6, 0.4], dtype=torch.float64).log(),
    )
    pi = make_rule("token_v3", alpha=0.0).target(q, p)
    assert float((pi - p.exp()).abs().max()) > 0.2


def test_outside_its_set_v3_is_stricter_than_lossless():
    for case in RANDOM:
        q = torch.softmax(case.drafter / case.temperature, dim=-1)
        p = torch.softmax(case.verifier / case.temperature, dim=-1)
        keep = p >= 0.5 * p.amax(-1, keepdim=True)
        pi = keep_distribution(q, p, keep)
        assert bool((pi[~keep] <= p[~keep] + 1e-15).all())


def test_opt_ends_at_temperature_one():
    """|max p - max q| <= D_TV, so that alpha < -1 is lossless and alpha >= 1 keeps the drafter there."""
    for case in [c for c in RANDOM if c.temperature == 1]:
        pi = distribution("opt", case, alpha=-1.01)
        torch.testing.assert_close(pi, distribution("lossless", case), atol=1e-12, rtol=0)
        assert torch.equal(distribution("opt", case, alpha=1.01), distribution("drafter_only", case))


def test_opt_has_no_lossless_alpha_at_other_temperatures():
    """A sharpened pair can have a tiny D_TV although max q > max p: every finite alpha keeps q somewhere."""
    q, p = (
        torch.tensor([0.9, 0.1], dtype=torch.float64).log(),
        torch.tensor([0.6, 0.4], dtype=torch.float64).log(),
    )
    for alpha in (-1.0, -10.0, -100.0):
        temperature = 1.0
        while summarize(q, p, temperature=temperature).tv >= 0.29 / abs(alpha):
            temperature *= 0.8
        rule = make_rule("opt", alpha=alpha)
        assert not bool(rule.defer(summarize(q, p, temperature=temperature)))
    assert make_rule("opt").dial.lossless is None
