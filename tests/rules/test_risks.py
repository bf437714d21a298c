"""Risks and regret against their definitions; which estimators are unbiased and which are not."""

from __future__ import annotations

import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.rules import make_rule, summarize
from deferral_train.rules.risks import (
    LOSSES,
    deferral_risk,
    emitted_risk,
    expected_gap,
    expected_loss,
    gap_from_gold,
    gap_from_truth,
    gold_floor_hits,
    hindsight_excess,
    lemma5_bound,
    optimal,
    regret,
    speculative_risk,
    token_loss,
)

N, V = 200, 6
SPEC = ("drafter_max", "drafter_argmax", "verifier_argmax", "drafter_logprob", "verifier_logprob", "token")


@pytest.fixture(scope="module")
def distributions():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, N, V, generator=generator, dtype=torch.float64) * 1.5
    return torch.softmax(logits, dim=-1).unbind(0)


def every_gold(q, p):
    """Summaries for every token as the gold one, [V, N]."""
    token = torch.arange(V).unsqueeze(1).expand(V, N)
    return summarize(q.log().expand(V, N, V), p.log().expand(V, N, V), token=token, fields=SPEC)


@pytest.mark.parametrize("loss", LOSSES)
def test_expected_loss_is_the_mean_of_the_token_loss(distributions, loss):
    q, _, truth = distributions
    every = torch.stack([token_loss(loss, q, torch.full((N,), y)) for y in range(V)], dim=-1)
    torch.testing.assert_close(expected_loss(loss, q, truth), (truth * every).sum(-1), atol=1e-13, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_gold_token_is_unbiased_for_the_gap(distributions, loss):
    q, p, truth = distributions
    gaps = gap_from_gold(every_gold(q, p), loss)  # [V, N]
    mean = (truth.T * gaps).sum(0)
    torch.testing.assert_close(mean, gap_from_truth(q, p, truth, loss), atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_expected_gap_is_the_gap_where_the_verifier_is_the_truth(distributions, loss):
    q, p, _ = distributions
    summary = summarize(q.log(), p.log())
    torch.testing.assert_close(expected_gap(summary, loss), gap_from_truth(q, p, p, loss), atol=1e-12, rtol=0)


def test_regret_is_the_excess_over_the_best_decision(distributions):
    q, p, truth = distributions
    drafter, verifier = expected_loss("zero_one", q, truth), expected_loss("zero_one", p, truth)
    tv = summarize(q.log(), p.log()).tv
    for alpha in (-0.3, 0.0, 0.4):
        risks = {
            r: speculative_risk(torch.full((N,), r), drafter, verifier, tv, alpha) for r in (True, False)
        }
        best = torch.minimum(risks[True], risks[False])
        for defer in (torch.rand(N) < 0.5, torch.ones(N, dtype=torch.bool)):
            excess = speculative_risk(defer, drafter, verifier, tv, alpha) - best
            torch.testing.assert_close(
                regret(drafter - verifier, tv, defer, alpha), excess, atol=1e-13, rtol=0
            )
        assert not bool(regret(drafter - verifier, tv, optimal(drafter - verifier, tv, alpha), alpha).any())
        called = deferral_risk(torch.ones(N, dtype=torch.bool), drafter, verifier, alpha)
        torch.testing.assert_close(called, verifier + alpha, atol=0, rtol=0)


def test_an_estimate_within_e_has_regret_within_e(distributions):
    q, p, truth = distributions
    gap, tv = gap_from_truth(q, p, truth), summarize(q.log(), p.log()).tv
    noise = (torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1) * 0.1
    for alpha in (-0.3, 0.0, 0.4):
        assert float(regret(gap, tv, optimal(gap + noise, tv, alpha), alpha).max()) <= 0.1


def test_opt_verifier_is_optimal_where_the_verifier_is_the_truth(distributions):
    q, p, _ = distributions
    summary = summarize(q.log(), p.log())
    defer = make_rule("opt_verifier", alpha=0.2).defer(summary)
    assert not bool(regret(gap_from_truth(q, p, p), summary.tv, defer, 0.2).any())


def test_hindsight_excess_is_biased_upwards(distributions):
    """The per-token minimum lies below the minimum of the expectation."""
    q, p, truth = distributions
    tv = summarize(q.log(), p.log()).tv
    defer = make_rule("opt", alpha=0.1).defer(summarize(q.log(), p.log()))
    gold = gap_from_gold(every_gold(q, p), "zero_one")
    mean = (truth.T * hindsight_excess(gold, tv, defer, 0.1)).sum(0)
    exact = regret(gap_from_truth(q, p, truth), tv, defer, 0.1)
    assert bool((mean >= exact - 1e-12).all())
    assert float(mean.mean() - exact.mean()) > 0.05


def test_differences_between_two_rules_are_unbiased(distributions):
    q, p, truth = distributions
    summary = summarize(q.log(), p.log())
    first, second = make_rule("opt").defer(summary), make_rule("chow", alpha=0.5).defer(summary)

    def risk(defer, drafter, verifier):
        return speculative_risk(defer, drafter, verifier, summary.tv, 0.2)

    exact = [
        risk(d, expected_loss("zero_one", q, truth), expected_loss("zero_one", p, truth))
        for d in (first, second)
    ]
    gold = 0.0
    for y in range(V):
        token = torch.full((N,), y)
        losses = token_loss("zero_one", q, token), token_loss("zero_one", p, token)
        gold = gold + truth[:, y] * (risk(first, *losses) - risk(second, *losses))
    torch.testing.assert_close(gold, exact[0] - exact[1], atol=1e-12, rtol=0)


def test_lemma_5_bounds_opt_and_is_reached():
    q = torch.tensor([[0.5 + 1e-9, 0.5 - 1e-9]], dtype=torch.float64)
    p = torch.tensor([[0.5 - 1e-9, 0.5 + 1e-9]], dtype=torch.float64)
    truth = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    defer = make_rule("opt", alpha=0.0).defer(summarize(q.log(), p.log()))
    excess, bound = regret(gap_from_truth(q, p, truth), 0.0, defer, 0.0), lemma5_bound(q, p, truth)
    assert not bool(defer)
    assert float(excess / bound) == pytest.approx(1.0, abs=1e-6)


def test_the_floor_is_counted():
    q, p = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[0.5, 0.5]]).double()
    summary = summarize(q.log(), p.log(), token=torch.tensor([0]), fields=SPEC)
    assert gold_floor_hits(summary) == 1
    assert float(gap_from_gold(summary, "log", floor=-10.0)) == pytest.approx(10.0 + float(p[0, 0].log()))
    assert float(expected_loss("log", q, p, floor=-10.0)) == pytest.approx(5.0)


def test_emitted_risk(distributions):
    q, p, truth = distributions
    pi = make_rule("token_v3", alpha=0.4).target(q.log(), p.log())
    torch.testing.assert_close(emitted_risk(pi, truth), (truth * (1 - pi)).sum(-1), atol=1e-13, rtol=0)
    greedy = make_rule("lossless").target(q.log(), p.log(), 0.0)
    torch.testing.assert_close(
        emitted_risk(greedy, truth), expected_loss("zero_one", p, truth), atol=1e-13, rtol=0
    )


def test_unknown_losses_are_refused(distributions):
    q, p, truth = distributions
    with pytest.raises(InputError, match="zero_one, log, prob"):
        expected_loss("hinge", q, truth)
    with pytest.raises(InputError, match="hinge"):
        gap_from_gold(every_gold(q, p), "hinge")
