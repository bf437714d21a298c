"""Offline scores of a rule on logged positions: deferral, rejection and emitted distribution, with bounds.

Position rules are exact from the summary alone, at any temperature that its `tv` belongs to. Token and distribution
rules read the logged candidates; every number comes as (value, bound), |truth - value| <= bound being what
the unlogged tail can change. Verifier and drafter supports are taken to be whole (no top-k or top-p). At
temperature 0 the summary decides alone, except for `ensemble`. Shapes: N positions, K candidates.

A rule states its own bounds (base.py); token rules that keep by a threshold on q(v) or p(v) (`monotone`) have them.
Of a rule without one the value is that of a stand-in for the tail, and the bound NaN. Below temperature 1 bounds
hold to first order in the tail masses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.rules.base import PositionRule, Rule
from deferral_train.rules.summary import Summary
from deferral_train.rules.tails import Candidates, Estimate, exact, needs_candidates, tailed


def deferral_rate(
    rule: Rule, summary: Summary, candidates: Candidates | None = None, temperature: float = 1.0
) -> Estimate:
    """Probability that a drafted token is deferred, and its bound, [N] each.

    Position rules: 0 or 1. Token rules: the drafter's mass on tokens not kept. Distribution rules have no decision:
    their rejection rate over D_TV, the share of lossless rejections that they still make.
    """
    if rule.is_lossless:
        return exact(torch.ones(summary.shape, dtype=torch.float64))
    return rule.logged_deferral(summary, candidates, temperature)


def rejection_rate(
    rule: Rule, summary: Summary, candidates: Candidates | None = None, temperature: float = 1.0
) -> Estimate:
    """The probability that a drafted token is rejected, and its bound, [N] each: D_TV(q, pi).

    Position rules: r * tv (Lemma 3), exact. `cactus` checks x against a distribution of x's own and rejects sum_x
    (q(x) - h_x(x))+, of which its residuals may give back, so that D_TV(q, pi) can be less.

    Args:
        summary: fields in `rule.needs` and `tv` (of this temperature); at temperature 0 also drafter_max,
            verifier_at_drafter_argmax and both argmaxes.
    """
    if rule.is_lossless:
        return exact(summary["tv"].double())
    return rule.logged_rejection(summary, candidates, temperature)


def acceptance_rate(
    rule: Rule, summary: Summary, candidates: Candidates | None = None, temperature: float = 1.0
) -> Estimate:
    """1 - `rejection_rate`, with the same bound."""
    value, bound = rejection_rate(rule, summary, candidates, temperature)
    return 1 - value, bound


def emitted_distribution(
    rule: Rule, summary: Summary, candidates: Candidates, temperature: float = 1.0
) -> Estimate:
    """pi on the candidates [N, K], and a bound [N, K] on each entry."""
    if temperature == 0:
        token, bound = _greedy_token(rule, summary, candidates)
        pi = (candidates.ids == token.unsqueeze(-1)).double()
        return pi, bound.unsqueeze(-1).expand_as(pi)
    if rule.is_lossless:
        _, distributions, _ = tailed(summary, candidates, temperature, rule.name)
        return distributions.p, distributions.slack.unsqueeze(-1) * distributions.p
    return rule.logged_distribution(summary, candidates, temperature)


def emitted_gold_risk(
    rule: Rule,
    summary: Summary,
    candidates: Candidates | None,
    gold: Tensor,
    temperature: float = 1.0,
) -> Estimate:
    """1 - pi(y) for gold tokens y [N], and its bound [N]; at temperature 0, 1[y != emitted].

    Position rules need no candidates at temperatures 0 and 1.

    Args:
        summary: as for `rejection_rate`, with token, drafter_logprob and verifier_logprob of the gold token
            (temperature above 0).
    """
    if temperature == 0:
        token, bound = _greedy_token(rule, summary, candidates)
        return (token != gold).double(), bound
    drafter, verifier = summary["drafter_logprob"].double(), summary["verifier_logprob"].double()
    if temperature == 1 and rule.is_lossless:
        return exact(1 - verifier.exp())
    if temperature == 1 and isinstance(rule, PositionRule):
        return exact(1 - torch.where(rule.defer(summary), verifier, drafter).exp())
    joined = needs_candidates(candidates, rule.name).with_token(gold, drafter, verifier)
    pi, bound = emitted_distribution(rule, summary, joined, temperature)
    place = (joined.ids == gold.unsqueeze(-1)).double().argmax(dim=-1, keepdim=True)
    return 1 - pi.gather(-1, place).squeeze(-1), bound.gather(-1, place).squeeze(-1)


def _greedy_token(rule: Rule, summary: Summary, candidates: Candidates | None) -> Estimate:
    if rule.is_lossless:
        verifier = summary["verifier_argmax"].long()
        return verifier, torch.zeros(verifier.shape, dtype=torch.float64)
    return rule.greedy_token(summary, candidates)
