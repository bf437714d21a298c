"""What verifying a block costs an accelerator: operators and copies to the host, for every rule of the catalogue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from instances import instances, label

from deferral_train.heads.gap import GapHead
from deferral_train.rules import Summary, make_rule, verify_block
from deferral_train.rules.learned import LearnedRule
from deferral_train.training.config import VERIFY_FEATURES

sys.path.insert(0, str(Path(__file__).parents[1]))
from launches import LaunchCounter

B, T, V = 1, 5, 64
# Operators of one block where every row drafted T: greedy, and sampled. A ragged batch adds those of its masks.
LOSSLESS, PLAIN, RAGGED = (18, 33), (34, 52), 12
DEARER = {
    "fuzzy": (38, 55),  # a Jensen-Shannon divergence of both models
    "typical": (34, 54),  # an entropy
    "csd": (38, 61),  # every token's pair is looked up
    "judi": (35, 52),  # a divergence and a maximum
    "mentored": (19, 133),  # its cap is searched for in three grids
    "judge": (44, 58),  # two thirds of it the head of the tests
    "learned": (48, 67),
    "token_gap": (38, 64),  # its estimate and its price of every token
}
TOGETHER = (0, 29)  # beyond token by token: products, corrections behind every place, coins
HEAD = 35  # operators of a head of the default features beyond those of `opt`, its summary fields included


def counted(rule, temperature, **options):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, B, T + 1, V, generator=generator)
    drafted = logits[0, :, :T].argmax(-1)
    with LaunchCounter() as count:
        verify_block(
            rule, drafted, logits[0, :, :T], logits[1], temperature=temperature, check=False, **options
        )
    return count


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("rule", instances(), ids=label)
def test_a_block_costs_few_operators_and_no_copy_to_the_host(rule, temperature):
    budget = (LOSSLESS if rule.is_lossless else DEARER.get(rule.name, PLAIN))[temperature > 0]
    for options, more in (({}, 0), ({"lengths": torch.full((B,), T)}, RAGGED), ({"bonus": "none"}, 4)):
        count = counted(rule, temperature, **options)
        assert count.host_copies == 0, count.copies
        assert count.launches <= budget + more, (options, count.launches, count.operators)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["lossless", "opt", "token_v3", "lossy"])
def test_block_verification_costs_few_operators_more(name, temperature):
    rule = make_rule(name)
    for options, more in (({}, 0), ({"lengths": torch.full((B,), T)}, 4)):
        each, together = (
            counted(rule, temperature, verification=way, **options) for way in ("token", "block")
        )
        assert together.host_copies == 0, together.copies
        assert together.launches <= each.launches + TOGETHER[temperature > 0] + more, together.operators


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_default_head_costs_few_operators_more_than_opt(temperature):
    head = GapHead(VERIFY_FEATURES).eval().requires_grad_(False)
    context = Summary({"position": torch.arange(T).expand(B, T)})
    costs = [
        counted(rule, temperature, context=context).launches
        for rule in (LearnedRule(head=head, alpha=0.1), make_rule("opt"))
    ]
    assert costs[0] - costs[1] <= HEAD, costs


def test_a_limit_adds_no_copy():
    rule = next(rule for rule in instances() if rule.name == "opt")
    assert counted(rule, 1.0, max_request_loss=1.0).host_copies == 0


def test_the_counter_sees_what_waits_for_the_device():
    values = torch.randn(4)
    with LaunchCounter() as count:
        values.view(2, 2).exp().sum().item()
        values[values > 0]
        bool(values.any())
    assert count.operators["exp"] == count.operators["sum"] == 1
    assert count.copies["_local_scalar_dense"] >= 1
    assert count.copies["masked index"] == 1
    assert count.host_copies >= 3
