"""Offline estimates from logged candidates against whole distributions: exact where said, within the bound
elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from instances import DraftGap, build, label, with_target

from deferral_train.errors import InputError
from deferral_train.rules import make_rule, summarize
from deferral_train.rules.base import LawRule, PositionRule
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.emission import rejection_mass
from deferral_train.rules.offline import (
    Candidates,
    acceptance_rate,
    deferral_rate,
    emitted_distribution,
    emitted_gold_risk,
    rejection_rate,
)

N, V, K = 120, 60, 8
RULES = [r for r in with_target() if r.name != "judge"]


def logged(temperature, seed=1, kept=K):
    generator = torch.Generator().manual_seed(seed)
    verifier = torch.randn(N, V, generator=generator, dtype=torch.float64) * 2
    drafter = verifier + torch.randn(N, V, generator=generator, dtype=torch.float64)
    log_q, log_p = torch.log_softmax(drafter, -1), torch.log_softmax(verifier, -1)
    q_ids, p_ids = log_q.topk(kept).indices, log_p.topk(kept).indices
    gold = torch.randint(0, V, (N,), generator=generator)
    candidates = Candidates.union(
        q_ids, (log_q.gather(1, q_ids), log_p.gather(1, q_ids)),
        p_ids, (log_q.gather(1, p_ids), log_p.gather(1, p_ids)),
    )  # fmt: skip
    summary = summarize(drafter, verifier, temperature=temperature, token=gold)
    return drafter, verifier, candidates, summary, gold


def sampling(logits, temperature):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), V).double()
    return torch.softmax(logits / temperature, -1)


def test_candidates_hold_no_token_twice():
    _, _, candidates, _, gold = logged(1.0)
    for joined in (candidates, candidates.with_token(gold, gold * 0.0, gold * 0.0)):
        for row in joined.ids.tolist():
            real = [x for x in row if x >= 0]
            assert len(real) == len(set(real))
    drafter, verifier, candidates, _, _ = logged(1.0)
    for row, q, p in zip(candidates.ids.tolist(), drafter, verifier):
        assert {x for x in row if x >= 0} == {*q.topk(K).indices.tolist(), *p.topk(K).indices.tolist()}
    both = candidates.with_token(gold, gold * 0.0, gold * 0.0)
    assert bool((both.ids == gold.unsqueeze(1)).any(1).all())


def checked_one_by_one(rule, drafter, verifier, q, temperature):
    """1 - sum_x q(x) min(1, distribution_x(x) / q(x)), with the distribution that a drafted x is checked against."""
    distributions = Distributions.of(drafter, verifier, temperature)
    kept = torch.zeros(N, dtype=torch.float64)
    for x in range(V):
        token = torch.full((N,), x)
        kept += torch.minimum(q[:, x], rule.step_distribution(distributions, None, token)[:, x])
    return 1 - kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES, ids=label)
def test_rejection_within_its_bound(rule, temperature):
    drafter, verifier, candidates, summary, _ = logged(temperature)
    pi, q = rule.target(drafter, verifier, temperature), sampling(drafter, temperature)
    exact = rejection_mass(pi, q)
    if rule.name == "cactus":  # each drafted token against the distribution that the loop checks it with
        exact = checked_one_by_one(rule, drafter, verifier, q, temperature)
    value, bound = rejection_rate(rule, summary, candidates, temperature)
    assert bool(((value - exact).abs() <= bound + 1e-9).all())
    if isinstance(rule, PositionRule):
        assert not bool(bound.any())
        torch.testing.assert_close(rejection_rate(rule, summary, None, temperature)[0], value)
    elif rule.name in ("ensemble", "biased") and temperature == 1:
        torch.testing.assert_close(value, exact, atol=1e-12, rtol=0)
    accepted, same = acceptance_rate(rule, summary, candidates, temperature)
    torch.testing.assert_close(accepted, 1 - value)
    torch.testing.assert_close(same, bound)


def test_bounds_are_useful():
    """With 8 of 60 tokens logged the tail must not drown the numbers; with all logged it is nothing."""
    _, _, candidates, summary, _ = logged(1.0)
    for name in ("token_v2", "token_v3", "typical", "lossy", "lenient", "mentored"):
        value, bound = rejection_rate(build(name, {}), summary, candidates)
        assert float(bound.mean()) < 0.08, name
        assert float(value.mean()) > 0.02, name


@pytest.mark.parametrize("temperature", [0.5, 0.8])
@pytest.mark.parametrize("name", ["opt", "token_v1", "token_v3", "typical", "ensemble", "lossy"])
def test_below_temperature_one(name, temperature):
    drafter, verifier, candidates, summary, _ = logged(temperature, kept=32)
    rule = make_rule(name)
    exact = rejection_mass(rule.target(drafter, verifier, temperature), sampling(drafter, temperature))
    value, bound = rejection_rate(rule, summary, candidates, temperature)
    assert bool(((value - exact).abs() <= bound + 1e-9).all())
    assert float(bound.mean()) < 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES, ids=label)
def test_emitted_distribution_and_gold_risk(rule, temperature):
    drafter, verifier, candidates, summary, gold = logged(temperature)
    pi = rule.target(drafter, verifier, temperature)
    distribution, bound = emitted_distribution(rule, summary, candidates, temperature)
    real = candidates.ids >= 0
    exact = pi.gather(1, candidates.ids.clamp(min=0))
    if rule.name != "cactus":
        assert bool(((distribution - exact).abs() <= bound + 1e-9)[real].all())
    value, slack = emitted_gold_risk(rule, summary, candidates, gold, temperature)
    risk = 1 - pi.gather(1, gold.unsqueeze(1)).squeeze(1)
    if rule.name != "cactus":
        assert bool(((value - risk).abs() <= slack + 1e-9).all())
    if isinstance(rule, PositionRule):
        torch.testing.assert_close(value, risk, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", [r for r in RULES if not hasattr(r, "law")], ids=label)
def test_deferral_rate(rule, temperature):
    drafter, verifier, candidates, summary, _ = logged(temperature)
    value, bound = deferral_rate(rule, summary, candidates, temperature)
    q = sampling(drafter, temperature)
    if rule.is_lossless:
        exact = torch.ones(N, dtype=torch.float64)
    elif isinstance(rule, PositionRule):
        exact = rule.defer(summary).expand(N).double()
    else:
        distributions = Distributions.of(drafter, verifier)
        keep = rule.keep(distributions.drafter_logprobs, distributions.verifier_logprobs, summary)
        exact = (q * ~keep).sum(-1)
    assert bool(((value - exact).abs() <= bound + 1e-9).all())


def test_what_cannot_be_scored_offline_is_refused():
    _, _, candidates, summary, _ = logged(1.0)
    with pytest.raises(InputError, match=r"rule token_v3: .*candidates"):
        rejection_rate(make_rule("token_v3"), summary)
    with pytest.raises(InputError, match="judge"):
        rejection_rate(build("judge", {}), summary, candidates)
    for score in (rejection_rate, deferral_rate, emitted_distribution):
        with pytest.raises(InputError, match="rule fly judges drafted blocks as a whole"):
            score(build("fly", {}), summary, candidates)
    with pytest.raises(InputError, match=r"temperature 1\.5"):
        rejection_rate(make_rule("token_v3"), summary, candidates, temperature=1.5)
    value, _ = rejection_rate(make_rule("learned", head=DraftGap()), summary)
    assert value.shape == (N,)


@dataclass(frozen=True)
class Tilted(LawRule):
    """A rule of a user's own: it says nothing of bounds. At temperature 0 it emits the drafter's argmax."""

    name: ClassVar[str] = "tilted"

    def law(self, q, p, summary):
        return 0.7 * q + 0.3 * p


@dataclass(frozen=True)
class TiltedByHand(Tilted):
    name: ClassVar[str] = "tilted_by_hand"

    def greedy(self, distributions, summary):
        return distributions.drafter(distributions.best)


def test_a_rule_that_states_no_bound_is_scored_without_one():
    drafter, verifier, candidates, summary, _ = logged(1.0)
    rule = Tilted()
    value, bound = rejection_rate(rule, summary, candidates)
    exact = rejection_mass(rule.target(drafter, verifier), sampling(drafter, 1.0))
    assert bool(bound.isnan().all())
    torch.testing.assert_close(value, exact, atol=0.05, rtol=0)
    distribution, bound = emitted_distribution(rule, summary, candidates)
    assert bool(bound.isnan().all())
    assert not bool(distribution.isnan().any())


def test_a_users_rule_is_not_taken_for_lossless_at_temperature_zero():
    drafter, verifier, candidates, summary, gold = logged(0.0)
    rule = Tilted()
    pi = rule.target(drafter, verifier, 0.0)
    value, bound = rejection_rate(rule, summary, candidates, 0.0)
    assert not bool(bound.any())
    torch.testing.assert_close(value, rejection_mass(pi, sampling(drafter, 0.0)).round(), atol=0, rtol=0)
    assert float(value.sum()) == 0 < float(summary.tv.sum())
    with pytest.raises(InputError, match="rule tilted_by_hand: its greedy token is not known"):
        emitted_gold_risk(TiltedByHand(), summary, candidates, gold, 0.0)


def test_candidates_say_what_they_leave_out():
    drafter, verifier, candidates, _, _ = logged(1.0)
    for logits, rest in ((drafter, candidates.drafter_rest), (verifier, candidates.verifier_rest)):
        distribution = torch.softmax(logits, -1)
        inside = distribution.gather(1, candidates.ids.clamp(min=0)) * candidates.valid
        torch.testing.assert_close(rest, 1 - inside.sum(1), atol=1e-12, rtol=0)
    assert 0 < float(candidates.rounding.max()) < 2e-3
