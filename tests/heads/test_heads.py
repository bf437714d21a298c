import itertools
import math

import numpy as np
import pytest
import torch
from heads.distributions import FEATURES, every_head, logits, shaken, summary_of

from deferral_train.errors import InputError
from deferral_train.heads import CostSensitiveHead, GapHead, PlugInHead, TokenHead, TruthMixtureHead
from deferral_train.heads.rules import LearnedTokenRule, dropped_set, learned_rule
from deferral_train.rules import make_rule, summarize
from deferral_train.rules.learned import LearnedRule

VERIFY = [name for name in every_head() if "draft" not in name]


@pytest.mark.parametrize("name", VERIFY)
def test_leading_shape_is_free_and_rows_do_not_mix(name):
    head, summary = every_head()[name], summary_of(24)
    whole = head.gap(summary)
    shaped = head.gap(type(summary)({n: summary[n].reshape(2, 3, 4) for n in summary.names}))
    torch.testing.assert_close(shaped.reshape(-1), whole)
    one = head.gap(summary.select(torch.tensor([7])))
    torch.testing.assert_close(one[0], whole[7])


@pytest.mark.parametrize("name", ["gap", "truth_mixture", "token", "cost_sensitive"])
def test_zero_one_gap_is_zero_where_argmaxes_agree(name):
    head, summary = every_head()[name], summary_of(300)
    agree = summary["drafter_argmax"] == summary["verifier_argmax"]
    assert agree.any()
    assert not agree.all()
    assert head.gap(summary)[agree].abs().max() < 1e-5
    rule = LearnedRule(head=head, alpha=0.2)
    assert not rule.defer(summary)[agree].any()
    assert LearnedRule(head=head, alpha=-0.2).defer(summary)[agree].all()


def test_nan_features_defer():
    head, summary = every_head()["gap"], summary_of(5)
    bad = summary.with_fields({"kl": torch.full((5,), math.nan)})
    assert LearnedRule(head=head, alpha=0.5).defer(bad).all()
    cost = every_head()["cost_sensitive"]
    differ = summary["drafter_argmax"] != summary["verifier_argmax"]
    assert LearnedRule(head=cost, alpha=0.5).defer(bad)[differ].all()


def test_regret_of_a_verify_stage_head_that_computes_the_gap_is_zero_under_verifier_truth():
    """Under P := p the gap is a function of the features, so this is a unit test and never a result."""
    summary = summary_of(400)
    exact = summary["verifier_max"] - summary["verifier_at_drafter_argmax"]
    head = GapHead(["verifier_max", "verifier_at_drafter_argmax"], body="linear")
    with torch.no_grad():
        head.body[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
    for alpha in (0.0, 0.3, 1.0):
        ours = LearnedRule(head=head.eval(), alpha=alpha).defer(summary)
        best = exact > alpha * summary["tv"]
        margin = (exact - alpha * summary["tv"]).abs()
        assert (margin * (ours != best)).max() < 1e-6


def test_truth_mixture_starts_at_the_verifier_and_sums_to_one_over_its_classes():
    summary = summary_of(100)
    fresh = TruthMixtureHead(FEATURES).eval()
    torch.testing.assert_close(fresh.verifier_value(summary), summary["verifier_max"], rtol=1e-4, atol=1e-5)
    wanted = summary["verifier_max"] - summary["verifier_at_drafter_argmax"]
    torch.testing.assert_close(fresh.gap(summary), wanted, rtol=1e-4, atol=1e-5)
    head = every_head()["truth_mixture"]
    mass = head.class_logits(head.columns(summary)).softmax(-1).detach()
    q, p = logits(100)
    ends = torch.stack([summary["verifier_argmax"], summary["drafter_argmax"]], -1)
    truth = head.truth(q.log_softmax(-1).gather(-1, ends), p.log_softmax(-1).gather(-1, ends), summary)
    torch.testing.assert_close(truth[:, 0], mass[:, 0], rtol=1e-4, atol=1e-6)
    differ = summary["drafter_argmax"] != summary["verifier_argmax"]
    torch.testing.assert_close(truth[differ, 1], mass[differ, 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mass.sum(-1), torch.ones(100))


def test_token_head_formula_in_numpy():
    head, summary = every_head()["token"], summary_of(30)
    q, p = (t.log_softmax(-1) for t in logits(30))
    a, b, c = (t.detach().double().numpy()[:, None] for t in head.coefficients(head.columns(summary)))
    odds = a * p.double().numpy() + b * q.double().numpy() + c
    np.testing.assert_allclose(head.truth(q, p, summary).numpy(), 1 / (1 + np.exp(-odds)), rtol=2e-4)


def test_learned_token_rule_keeps_what_its_inequality_says_on_any_candidates():
    head, summary = every_head()["token"], summary_of(40)
    q, p = (t.log_softmax(-1) for t in logits(40))
    rule = LearnedTokenRule(head=head, alpha=0.1)
    keep = rule.keep(q, p, summary)
    value, truth = head.verifier_value(summary), head.truth(q, p, summary)
    for row in range(40):
        for token in range(9):
            assert bool(keep[row, token]) == bool(value[row] - truth[row, token] <= 0.1 + 1e-6)
    part = rule.keep(q[:, 2:5], p[:, 2:5], summary)
    assert torch.equal(part, keep[:, 2:5])
    target = rule.target(*logits(40))
    torch.testing.assert_close(target.sum(-1), torch.ones(40))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.1, 0.4])
def test_priced_token_rule_against_every_subset(alpha):
    """What it gains under pi_Token, per alpha: near the best of all subsets, never below keeping all or none."""
    rows, size = 60, 6
    q, p = ((2 * t).softmax(-1).double() for t in logits(rows, size))
    truth = (p**1.3 * q**0.2) / (p**1.3 * q**0.2).sum(-1, keepdim=True)
    subsets = torch.tensor(list(itertools.product([False, True], repeat=size)))  # [64, V], dropped
    found = dropped_set(q, p, truth, alpha)

    def gained(dropped):
        """E truth(emitted) under pi_Token minus that of q, minus alpha D_TV(q, pi_Token); by the definitions."""
        pi = q * ~dropped + (q * dropped).sum(-1, keepdim=True) * p
        return (truth * (pi - q)).sum(-1) - alpha * (q - pi).clamp(min=0).sum(-1)

    every = torch.stack([gained(subset.expand(rows, size)) for subset in subsets], dim=-1)
    ours = gained(found)
    assert (ours >= torch.maximum(every[:, 0], every[:, -1]) - 1e-12).all()
    assert ours.mean() >= 0.98 * every.amax(-1).mean() - 1e-12
    assert 0 < found.double().mean() < 1 or alpha < 0


def test_plug_in_without_recalibration_is_opt():
    summary = summary_of(300)
    head = PlugInHead().eval()
    for alpha in (-0.3, 0.0, 0.4, 1.0):
        ours = LearnedRule(head=head, alpha=alpha).defer(summary)
        assert torch.equal(ours, make_rule("opt", alpha=alpha).defer(summary))


def test_implied_gap_of_cost_sensitive_head_is_where_its_decision_flips():
    head = CostSensitiveHead(["verifier_max", "verifier_at_drafter_argmax"], body="linear")
    with torch.no_grad():  # score = p(v_p) - p(v_q) - alpha tv
        head.body[0].weight.copy_(torch.tensor([[1.0, -1.0, 0.0, -1.0]]))
    summary = summary_of(200)
    exact = summary["verifier_max"] - summary["verifier_at_drafter_argmax"]
    torch.testing.assert_close(head.gap(summary), exact, rtol=0, atol=1e-5)


def test_draft_stage_predicts_tv_and_rejection_and_never_reads_the_verifier():
    head = every_head()["gap_draft"]
    q, p = logits(50)
    summary, other = summarize(q, p), summarize(q, p.flip(0))
    for name in ("tv", "reject"):
        value = getattr(head, name)(summary)
        assert ((value >= 0) & (value <= 1)).all()
        assert torch.equal(value, getattr(head, name)(other))
    assert LearnedRule(head=head, alpha=0.1).stage == "draft"
    with pytest.raises(InputError, match="exact"):
        every_head()["gap"].tv(summary)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GapHead(FEATURES, stage="later"), "later"),
        (lambda: GapHead(FEATURES, loss="hinge"), "hinge"),
        (lambda: GapHead(FEATURES, body="tree"), "tree"),
        (lambda: GapHead(FEATURES, hidden=(0,)), "positive"),
        (lambda: GapHead(FEATURES, hidden=(10**9,)), "parameters"),
        (lambda: TruthMixtureHead(["drafter_max"], stage="draft"), "drafter_at_verifier_argmax|verify"),
        (lambda: TruthMixtureHead(FEATURES, loss="log"), "zero_one"),
        (lambda: TokenHead(FEATURES, loss="log"), "zero_one or prob"),
        (lambda: PlugInHead(["tv"]), "drafter_max"),
        (lambda: learned_rule(GapHead(FEATURES)), "alpha"),
        (lambda: learned_rule(GapHead(FEATURES), 0.1, tokenwise=True), "gap"),
    ],
)
def test_wrong_settings_are_refused_by_name(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_untrained_gap_head_predicts_no_gap():
    assert GapHead(FEATURES).eval().gap(summary_of(50)).abs().max() == 0
    assert shaken(GapHead(FEATURES)).gap(summary_of(50)).abs().max() > 0
