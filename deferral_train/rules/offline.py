"""What a rule would have done on logged positions: deferral, rejection and emitted law, from a Summary.

Position rules are exact from the summary alone, at any temperature that its `tv` belongs to. Token and law
rules read the logged candidates; every number comes as (value, bound), |truth - value| <= bound being what
the unlogged tail can change. Verifier and drafter supports are taken to be whole (no top-k or top-p). At
temperature 0 the summary decides alone, except for `ensemble`. Shapes: N positions, K candidates.

Bounds hold for token rules that keep by a threshold on q(v) or p(v) (`monotone`) and for `lossy`, `lenient`,
`mentored`, `ensemble`, `biased`: their rejection can only fall when tokens are merged. Below temperature 1
they hold to first order in the tail masses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import LawRule, PositionRule, Rule, TokenRule
from deferral_train.rules.baselines import Biased, Cactus, Ensemble, Lossy, Mentored
from deferral_train.rules.emission import rejection_mass
from deferral_train.rules.floors import clip_between, floor_for_cut
from deferral_train.rules.learned import Judge
from deferral_train.rules.summary import Summary
from deferral_train.rules.tails import Candidates, TailedLaws, align, argmax_logprobs, needs_candidates

Estimate = tuple[Tensor, Tensor]


def deferral_rate(
    rule: Rule, summary: Summary, candidates: Candidates | None = None, temperature: float = 1.0
) -> Estimate:
    """Probability that a drafted token is deferred, and its bound, [N] each.

    Position rules: 0 or 1. Token rules: the drafter's mass on tokens not kept. Law rules have no decision:
    their rejection rate over D_TV, the share of lossless rejections that they still make.
    """
    if rule.is_lossless:
        return _exact(torch.ones(summary.shape, dtype=torch.float64))
    if isinstance(rule, PositionRule):
        return _exact(rule.defer(summary).expand(summary.shape).double())
    if isinstance(rule, TokenRule):
        if temperature == 0:
            return _exact((~_keeps_argmax(rule, summary)).double())
        summary, candidates = align(summary, needs_candidates(candidates, rule.name))
        laws = TailedLaws.of(candidates, summary["tv"], temperature)
        low, high = _eta(rule, summary, candidates, laws)
        return _between(low, high, laws.slack)
    value, bound = rejection_rate(rule, summary, candidates, temperature)
    tv = summary["tv"].double()
    share = torch.where(tv > 0, 1 / tv, torch.zeros_like(tv))
    return (value * share).clamp(max=1.0), bound * share


def rejection_rate(
    rule: Rule, summary: Summary, candidates: Candidates | None = None, temperature: float = 1.0
) -> Estimate:
    """The probability that a drafted token is rejected, and its bound, [N] each: D_TV(q, pi).

    Position rules: r * tv (Lemma 3), exact. `cactus` checks x against a law of x's own and rejects sum_x (q(x) -
    h_x(x))+, of which its residuals may give back, so that D_TV(q, pi) can be less.

    Args:
        summary: fields in `rule.needs` and `tv` (of this temperature); at temperature 0 also drafter_max,
            verifier_at_drafter_argmax and both argmaxes.
    """
    if rule.is_lossless:
        return _exact(summary["tv"].double())
    if isinstance(rule, PositionRule):
        return _exact(rule.defer(summary).expand(summary.shape) * summary["tv"].double())
    if temperature == 0:
        token, bound = _greedy_token(rule, summary, candidates)
        return (token != summary["drafter_argmax"]).double(), bound
    summary, candidates = align(summary, needs_candidates(candidates, rule.name))
    laws = TailedLaws.of(candidates, summary["tv"], temperature)
    if isinstance(rule, TokenRule):
        low, high = _token_rejection(rule, summary, candidates, laws)
    else:
        low, high = _law_rejection(_law_rule(rule), summary, laws)
    return _between(low, high, 2 * laws.slack)


def acceptance_rate(
    rule: Rule, summary: Summary, candidates: Candidates | None = None, temperature: float = 1.0
) -> Estimate:
    """1 - `rejection_rate`, with the same bound."""
    value, bound = rejection_rate(rule, summary, candidates, temperature)
    return 1 - value, bound


def emitted_law(rule: Rule, summary: Summary, candidates: Candidates, temperature: float = 1.0) -> Estimate:
    """pi on the candidates [N, K], and a bound [N, K] on each entry."""
    if temperature == 0:
        token, bound = _greedy_token(rule, summary, candidates)
        pi = (candidates.ids == token.unsqueeze(-1)).double()
        return pi, bound.unsqueeze(-1).expand_as(pi)
    summary, candidates = align(summary, candidates)
    tv = summary["tv"] if "tv" in summary else torch.zeros(summary.shape, dtype=torch.float64)
    laws = TailedLaws.of(candidates, tv, temperature)
    slack = laws.slack.unsqueeze(-1)
    if rule.is_lossless:
        return laws.p, slack * laws.p
    if isinstance(rule, PositionRule):
        defer = rule.defer(summary).expand(summary.shape).unsqueeze(-1)
        pi = torch.where(defer, laws.p, laws.q)
        return pi, slack * pi
    if isinstance(rule, TokenRule):
        low, high = (eta.unsqueeze(-1) for eta in _eta(rule, summary, candidates, laws))
        kept = laws.q * _keep(rule, summary, candidates)
        return _between(kept + low * laws.p, kept + high * laws.p, slack)
    low, high = _law_range(_law_rule(rule), summary, laws)
    return _between(low, high, slack)


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
    if temperature == 1 and (rule.is_lossless or isinstance(rule, PositionRule)):
        keeps = isinstance(rule, PositionRule) and not rule.is_lossless
        defer = rule.defer(summary) if isinstance(rule, PositionRule) and keeps else summary.full(True)
        return _exact(1 - torch.where(defer, verifier, drafter).exp())
    joined = needs_candidates(candidates, rule.name).with_token(gold, drafter, verifier)
    pi, bound = emitted_law(rule, summary, joined, temperature)
    place = (joined.ids == gold.unsqueeze(-1)).double().argmax(dim=-1, keepdim=True)
    return 1 - pi.gather(-1, place).squeeze(-1), bound.gather(-1, place).squeeze(-1)


def _exact(value: Tensor) -> Estimate:
    return value, torch.zeros_like(value)


def _between(low: Tensor, high: Tensor, slack: Tensor) -> Estimate:
    return (low + high) / 2, (high - low).clamp(min=0.0) / 2 + slack


def _law_rule(rule: Rule) -> LawRule:
    if isinstance(rule, Judge) or not isinstance(rule, LawRule):
        raise InputError(f"rule {rule.name} judges drafted tokens one by one; measure it with decode")
    return rule


def _keep(rule: TokenRule, summary: Summary, candidates: Candidates) -> Tensor:
    return rule.keep(candidates.drafter_logprobs, candidates.verifier_logprobs, summary)


def _keeps_argmax(rule: TokenRule, summary: Summary) -> Tensor:
    logprobs = argmax_logprobs(summary)
    top = summary["verifier_max"].double().log().exp()  # as the candidate's own exp(log p) rounds
    return rule.keep(*logprobs, summary.with_fields({"verifier_max": top})).squeeze(-1)


def _eta(
    rule: TokenRule, summary: Summary, candidates: Candidates, laws: TailedLaws
) -> tuple[Tensor, Tensor]:
    """Lowest and highest eta = sum q over tokens not kept, [N]."""
    keep = _keep(rule, summary, candidates)
    logged = (laws.q * ~keep).sum(dim=-1)
    tail = laws.excess + laws.overlap
    # Where even the likeliest tail token would not be kept, none is.
    likeliest = rule.keep(
        candidates.drafter_least.unsqueeze(-1), candidates.verifier_least.unsqueeze(-1), summary
    ).squeeze(-1)
    none_kept = ~likeliest & rule.monotone
    return torch.where(none_kept, logged + tail, logged), logged + tail


def _token_rejection(
    rule: TokenRule, summary: Summary, candidates: Candidates, laws: TailedLaws
) -> tuple[Tensor, Tensor]:
    """Lowest and highest sum over tokens not kept of (q - eta p)+, [N]."""
    low_eta, high_eta = _eta(rule, summary, candidates, laws)
    dropped = laws.q * ~_keep(rule, summary, candidates)

    def logged(eta: Tensor) -> Tensor:
        return (dropped - eta.unsqueeze(-1) * laws.p).clamp(min=0.0).sum(dim=-1)

    tail_p = laws.overlap + laws.verifier_rest
    tail_q = laws.overlap + laws.excess
    least = torch.maximum(laws.excess, tail_q - high_eta * tail_p)
    tail_low = torch.where(low_eta == high_eta, least, torch.zeros_like(least))
    tail_high = laws.excess + (1 - low_eta).clamp(min=0.0) * laws.overlap
    return logged(high_eta) + tail_low, logged(low_eta) + tail_high


def _law_rejection(rule: LawRule, summary: Summary, laws: TailedLaws) -> tuple[Tensor, Tensor]:
    def rate(q: Tensor, p: Tensor) -> Tensor:
        return rejection_mass(rule.law(q, p, summary), q)

    if isinstance(rule, Cactus):
        # In the tail no more than (q - p)+, and perhaps nothing: many small tokens may all be raised enough.
        logged = (laws.q - rule.raised(laws.p)).clamp(min=0.0).sum(dim=-1)
        return logged, logged + laws.excess
    most = rate(*laws.with_tail(dispersed=True))
    if isinstance(rule, Mentored):
        # An optimum: a coarser pair never rejects more.
        return rate(*laws.with_single_tail()), most
    return torch.minimum(rate(*laws.with_tail(dispersed=False)), most), most


def _law_range(rule: LawRule, summary: Summary, laws: TailedLaws) -> tuple[Tensor, Tensor]:
    """Lowest and highest pi on the candidates, [N, K] each."""
    q, p, count = laws.q, laws.p, laws.q.shape[-1]
    if isinstance(rule, Cactus):
        return torch.minimum(q, rule.raised(p)), torch.ones_like(p)
    if isinstance(rule, Mentored):
        return torch.minimum(q, p), torch.maximum(q, p)
    if isinstance(rule, Lossy):
        cap = rule.cap(p)
        cuts = _law_rejection(rule, summary, laws)
        # More is cut and less is raised in a merged tail: the floor lies between these two.
        low = floor_for_cut(*laws.with_tail(dispersed=True), cuts[0].unsqueeze(-1))
        high = floor_for_cut(*laws.with_single_tail(), cuts[1].unsqueeze(-1))
        return clip_between(q, p, low, cap), clip_between(q, p, torch.maximum(low, high), cap)
    first, second = (
        rule.law(*laws.with_tail(dispersed), summary)[..., :count] for dispersed in (False, True)
    )
    return torch.minimum(first, second), torch.maximum(first, second)


def _greedy_token(rule: Rule, summary: Summary, candidates: Candidates | None) -> tuple[Tensor, Tensor]:
    """The token emitted at temperature 0 and a bound (0, or 1 where the tail could hold it), [N]."""
    drafter, verifier = summary["drafter_argmax"].long(), summary["verifier_argmax"].long()
    exact = torch.zeros(drafter.shape, dtype=torch.float64)
    if rule.is_lossless:
        return verifier, exact
    if isinstance(rule, PositionRule):
        return torch.where(rule.defer(summary).expand(drafter.shape), verifier, drafter), exact
    if isinstance(rule, TokenRule):
        return torch.where(_keeps_argmax(rule, summary), drafter, verifier), exact
    if isinstance(rule, Biased):
        return torch.where(rule.stands(summary), drafter, verifier), exact
    if isinstance(rule, Ensemble):
        return _greedy_ensemble(rule, needs_candidates(candidates, rule.name), drafter)
    _law_rule(rule)
    # The law of two one-hots: lossy, lenient, mentored and cactus are lossless there.
    return verifier, exact


def _greedy_ensemble(rule: Ensemble, candidates: Candidates, drafter: Tensor) -> tuple[Tensor, Tensor]:
    if rule.weight == 0:
        return drafter, torch.zeros(drafter.shape, dtype=torch.float64)
    mixture = rule.weight * candidates.verifier_logprobs.exp()
    mixture = mixture + (1 - rule.weight) * candidates.drafter_logprobs.exp()
    top = mixture.amax(dim=-1, keepdim=True)
    beyond = torch.iinfo(torch.int64).max
    tied = (mixture == top) & (candidates.ids >= 0)
    token = candidates.ids.masked_fill(~tied, beyond).amin(dim=-1)
    rest = rule.weight * candidates.verifier_least.exp() + (1 - rule.weight) * candidates.drafter_least.exp()
    return token, (rest >= top.squeeze(-1)).double()
