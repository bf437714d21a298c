"""Every rule's distribution: enumerated execution = stated target = the plain-Python reference, within 1e-12."""

from __future__ import annotations

import make_catalogue
import pytest
import reference
import torch
from instances import PARAMETERS, DraftGap, label, reports, with_target

from deferral_train.rules import RULES, make_rule
from deferral_train.rules.base import PositionRule
from deferral_train.testing import Case, cases, check_rule, enumerate_emission

ALL_CASES = list(cases(seed=3, positions=4))


def at(case: Case, n: int) -> reference.Position:
    """One position of a case for the reference."""
    given = (case.drafter_sampling, case.verifier_sampling)
    sampling = [None if logits is None else logits[n].tolist() for logits in given]
    return reference.Position(
        case.drafter[n].tolist(), case.verifier[n].tolist(), case.temperature, *sampling
    )


def target(rule, case: Case) -> torch.Tensor:
    return rule.target(
        case.drafter,
        case.verifier,
        case.temperature,
        drafter_sampling_logits=case.drafter_sampling,
        verifier_sampling_logits=case.verifier_sampling,
    )


def test_the_table_covers_every_rule():
    assert set(PARAMETERS) == set(RULES)
    assert all(PARAMETERS.values())


def test_the_cases_cover_what_is_asked():
    kinds = {case.name.split()[0] for case in ALL_CASES}
    assert {"random", "tied", "peaked", "disjoint", "one_hot"} <= kinds
    assert {case.temperature for case in ALL_CASES} == {0.0, 0.5, 1.0}
    assert {case.name.split()[-1] for case in ALL_CASES} >= {"top_k", "top_p"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_check_rule_accepts_our_own(name):
    for report in reports(name):
        assert report.worst <= 1e-12
        assert report.rejection <= 1e-12


def test_the_catalogue_is_up_to_date():
    """Here, since it says what the reports above have found."""
    text = make_catalogue.CATALOGUE.read_text()
    written = text.split(make_catalogue.BEGIN)[1].split(make_catalogue.END)[0].strip()
    assert written == make_catalogue.table(), "run: python tests/rules/make_catalogue.py"


def test_check_rule_accepts_a_draft_stage_head():
    assert check_rule(make_rule("learned", head=DraftGap(), alpha=0.2)).kind == "position"


@pytest.mark.parametrize(
    "rule", [r for r in with_target() if r.stage == "verify" or r.name != "learned"], ids=label
)
def test_target_equals_the_reference(rule):
    for case in ALL_CASES:
        pi = target(rule, case)
        for n in range(pi.shape[0]):
            expected = torch.tensor(reference.target(rule, at(case, n)), dtype=torch.float64)
            error = float((pi[n] - expected).abs().max())
            assert error <= 1e-12, (case.name, case.temperature, n, error)


@pytest.mark.parametrize("rule", [r for r in with_target() if r.name not in ("cactus", "judge")], ids=label)
def test_the_reference_enumeration_emits_the_target(rule):
    if getattr(rule, "stage", "verify") == "draft" and rule.name == "learned":
        pytest.skip("the reference reads verify-stage heads")
    for case in ALL_CASES[::5]:
        for n in range(case.drafter.shape[0]):
            position = at(case, n)
            pi = reference.target(rule, position)
            emitted = reference.enumerate_step(pi, position.q)
            assert max(abs(a - b) for a, b in zip(emitted, pi)) <= 1e-12


def test_residual_keeps_the_true_proposal():
    """p = (.4,.6,0), q = (.5,.3,.2): renormalising q onto p's support would emit (.32,.68,0)."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    rule = make_rule("lossless")
    case = Case("example", 1.0, q.log().unsqueeze(0), p.log().unsqueeze(0))
    emitted, _ = enumerate_emission(rule, case.distributions())
    torch.testing.assert_close(emitted[0], p, atol=1e-15, rtol=0)
    torch.testing.assert_close(rule.target(q.log(), p.log()), p, atol=1e-15, rtol=0)


def test_a_masked_token_is_never_emitted_even_by_the_drafter_alone():
    drafter = torch.tensor([[4.0, 1.0, 0.0]]).double()
    verifier = torch.tensor([[-torch.inf, 1.0, 0.0]]).double()
    for temperature in (0.0, 1.0):
        pi = make_rule("drafter_only").target(drafter, verifier, temperature)
        assert pi[0, 0] == 0
        assert abs(float(pi.sum()) - 1) < 1e-15


def test_a_rule_that_breaks_the_contract_is_caught():
    class Renormalised(PositionRule):
        """Claims to defer always, but reports the drafter's distribution as its target."""

        name = "renormalised"

        def defer(self, summary):
            return summary.full(True)

        def target(self, drafter_logits, verifier_logits, temperature=1.0, **_):
            return torch.softmax(drafter_logits, dim=-1)

    with pytest.raises(AssertionError, match="renormalised"):
        check_rule(Renormalised())


def test_a_token_rule_that_depends_on_its_company_is_caught():
    from deferral_train.rules.base import TokenRule

    class BestHalf(TokenRule):
        name = "best_half"

        def keep(self, drafter_logprobs, verifier_logprobs, summary):
            return verifier_logprobs >= verifier_logprobs.mean(dim=-1, keepdim=True)

    with pytest.raises(AssertionError, match="best_half"):
        check_rule(BestHalf())
