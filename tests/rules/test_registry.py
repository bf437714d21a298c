"""Rules by name: parameters, dials, and imports of a user's own class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from instances import HEADS, PARTS, instances, label

from deferral_train.errors import InputError
from deferral_train.rules import RULES, base, make_rule
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import short_label

NAMES = [
    "lossless",
    "drafter_only",
    "verifier_only",
    "lossy",
    "lenient",
    "bild",
    "chow",
    "chow_log",
    "diff",
    "diff_log",
    "opt",
    "opt_log",
    "opt_verifier",
    "token_v1",
    "token_v2",
    "token_v3",
    "ensemble",
    "typical",
    "mentored",
    "fuzzy",
    "cactus",
    "logit_margin",
    "biased",
    "judge",
    "learned",
    "token_gap",
    "judi",
    "ears",
    "csd",
    "fly",
]


def test_every_public_name_is_there():
    assert set(RULES) >= set(NAMES)  # these stay; a new rule registers itself
    assert all(cls.name == name for name, cls in RULES.items())


@pytest.mark.parametrize("rule", instances(), ids=label)
def test_with_dial_keeps_the_rest(rule):
    if rule.dial is None:
        with pytest.raises(InputError, match="has no dial"):
            rule.with_dial(0.1)
        return
    grid = rule.dial.grid(7)
    assert len(grid) == 7
    assert grid == sorted(grid)
    moved = rule.with_dial(grid[3])
    assert type(moved) is type(rule)
    assert moved.dial_value == grid[3]
    for other in ("discrepancy", "delta", "head", "table", "window", "confidence"):
        if other != rule.dial.parameter:
            assert getattr(moved, other, None) is getattr(rule, other, None)


@pytest.mark.parametrize("name", sorted(n for n, cls in RULES.items() if cls.dial is not None))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9, "0.1", True])
def test_values_out_of_range_are_refused_by_name(name, value):
    head = PARTS.get(name, {})
    dial = RULES[name].dial
    if value == 1e9 and dial.unbounded:
        assert make_rule(name, **{dial.parameter: value}, **head).dial_value == 1e9
        return
    with pytest.raises(InputError, match=f"rule {name}.*{dial.parameter}"):
        make_rule(name, **{dial.parameter: value}, **head)


def test_unknown_names_and_parameters_are_refused():
    with pytest.raises(InputError, match="token_v3"):
        make_rule("token_v4")
    with pytest.raises(InputError, match="no parameter beta; its parameters: alpha"):
        make_rule("opt", beta=0.1)
    with pytest.raises(InputError, match="discrepancy"):
        make_rule("bild", discrepancy="hellinger")
    with pytest.raises(InputError, match="delta"):
        make_rule("typical", delta=3.0)
    with pytest.raises(InputError, match=r"confidence is 1\.2"):
        make_rule("judi", confidence=1.2)
    with pytest.raises(InputError, match="features"):
        make_rule("learned")


def test_a_users_rule_is_imported_only_when_asked(tmp_path, monkeypatch):
    (tmp_path / "rules_of_a_user.py").write_text(
        "from deferral_train.rules import PositionRule\n"
        "class Never(PositionRule):\n"
        "    name = 'never'\n"
        "    def defer(self, summary):\n"
        "        return summary.full(False)\n"
        "NOT_A_RULE = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="allow_import"):
        make_rule("rules_of_a_user:Never")
    rule = make_rule("rules_of_a_user:Never", allow_import=True)
    assert isinstance(rule, Rule)
    logits = torch.randn(2, 5)
    torch.testing.assert_close(rule.target(logits, torch.randn(2, 5)), torch.softmax(logits, -1))
    with pytest.raises(InputError, match="subclass"):
        make_rule("rules_of_a_user:NOT_A_RULE", allow_import=True)
    with pytest.raises(InputError, match="cannot be imported"):
        make_rule("rules_of_a_user:Nothing", allow_import=True)


def test_a_draft_stage_head_cannot_read_the_verifier():
    class Peeking:
        features = ("drafter_max", "verifier_max")
        stage = "draft"

        def gap(self, summary):
            return summary.verifier_max

        def tv(self, summary):
            return summary.drafter_max

    with pytest.raises(InputError, match="verifier_max"):
        make_rule("learned", head=Peeking())


def test_a_learned_rule_reads_confidence_as_its_head_does():
    assert make_rule("learned", head=HEADS["learned"]).reads_drafter_confidence

    class VerifierOnlyGap:
        features = ("verifier_max", "verifier_at_drafter_argmax")
        stage = "verify"

        def gap(self, summary):
            return summary.verifier_max - summary.verifier_at_drafter_argmax

    rule = make_rule("learned", head=VerifierOnlyGap(), alpha=0.1)
    assert not rule.reads_drafter_confidence
    drafter, verifier = torch.randn(40, 7).double(), torch.randn(40, 7).double()
    expected = make_rule("opt_verifier", alpha=0.1).target(drafter, verifier)
    assert torch.equal(rule.target(drafter, verifier), expected)


def test_a_head_with_its_own_decision_is_asked():
    class Own:
        features = ("tv",)
        stage = "verify"

        def gap(self, summary):
            return summary.tv * 0

        def defer(self, summary, alpha):
            return summary.tv > alpha

    rule = make_rule("learned", head=Own(), alpha=0.4)
    drafter, verifier = torch.randn(40, 7).double(), torch.randn(40, 7).double()
    expected = make_rule("bild", discrepancy="tv", alpha=0.4).target(drafter, verifier)
    assert torch.equal(rule.target(drafter, verifier), expected)


def test_a_short_label_keeps_both_ends():
    label = "learned:head=runs/a-long-name/head,alpha=0.25"
    assert short_label(label, 80) == label
    short = short_label(label, 31)
    assert len(short) == 31
    assert short.startswith("learned:head=")
    assert short.endswith("alpha=0.25")


def test_a_rule_registers_itself_and_is_found_by_name(monkeypatch):
    monkeypatch.setattr(base, "RULES", dict(RULES))

    @base.register
    @dataclass(frozen=True)
    class Own(base.PositionRule):
        """Defers at odd argmaxes."""

        name = "own"
        needs = frozenset({"drafter_argmax"})

        def defer(self, summary):
            return summary["drafter_argmax"] % 2 == 1

    assert base.RULES["own"] is Own
    assert "own" not in RULES


def test_sweeps_stay_within_the_range_and_hold_its_ends():
    for rule in RULES.values():
        if rule.dial is None:
            continue
        values = rule.dial.swept(11)
        assert len(values) == 11
        assert all(rule.dial.unbounded or rule.dial.low <= value <= rule.dial.high for value in values)
        if not rule.dial.unbounded:
            assert {rule.dial.low, rule.dial.high} <= set(values)
