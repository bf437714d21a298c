"""The decision of a step: each row by its own plan, whoever its neighbours are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from deferral_train.heads import GapHead
from deferral_train.rules import RULES, Origin, Summary, make_rule, verify_block
from deferral_train.serving import blocks
from deferral_train.serving.blocks import DraftedRows, RowSettings, verify
from deferral_train.serving.counters import Counters
from deferral_train.serving.tally import tally

sys.path.insert(0, str(Path(__file__).parents[1]))
from launches import LaunchCounter

R, T, V = 12, 3, 9


def rows(temperatures, distribution=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    verifier = torch.randn(R, T, V, generator=generator) * 1.5
    drafter = verifier + torch.randn(R, T, V, generator=generator)
    drafted = torch.empty(R, T, dtype=torch.int64)
    for row, temperature in enumerate(temperatures):
        if temperature == 0:
            drafted[row] = drafter[row].argmax(-1)
        else:
            drafted[row] = torch.multinomial(
                (drafter[row] / temperature).softmax(-1), 1, generator=generator
            )[:, 0]
    lengths = torch.tensor([1 + row % T for row in range(R)])
    return DraftedRows(drafted, lengths, verifier, temperatures, drafter, [distribution] * R)


def numbers(seed=1):
    return torch.rand(R, T + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_mixed_rows_are_verified_as_each_would_be_alone():
    temperatures = [(0.0, 1.0, 0.7)[row % 3] for row in range(R)]
    settings = [
        (
            RowSettings(),
            RowSettings(make_rule("opt", alpha=0.2)),
            RowSettings(make_rule("token_v3", alpha=0.9), 0.5, 0.02),
        )[row // 4]
        for row in range(R)
    ]
    block, draws = rows(temperatures), numbers()
    outcome = verify(block, settings, draws)
    for row in range(R):
        limit = settings[row].limit
        alone = verify_block(
            settings[row].rule,
            block.drafted[row : row + 1],
            block.drafter[row : row + 1],
            block.verifier[row : row + 1],
            temperature=temperatures[row],
            lengths=block.lengths[row : row + 1],
            bonus="none",
            numbers=draws[row : row + 1],
            max_request_loss=limit,
            spent=None if limit is None else torch.tensor([settings[row].spent], dtype=torch.float64),
        )
        assert outcome.accepted[row] == alone.accepted[0]
        assert outcome.correction[row] == alone.next_token[0]
        assert torch.equal(outcome.origin[row], alone.origin[0])
        if limit is not None:
            assert outcome.loss[row] == pytest.approx(float(alone.spent[0]) - settings[row].spent)
    assert not outcome.unlawful
    assert not outcome.faults
    assert outcome.loss.sum() > 0


HEAD = GapHead(("drafter_max", "kl", "draft_position", "position"), hidden=(4,))
GREEDY = {
    name: make_rule(name)
    for name in RULES
    if name not in ("judge", "learned", "token_gap", "csd", "verifier_only")
}
GREEDY |= {"learned": make_rule("learned", head=HEAD, alpha=0.05)}
GREEDY |= {f"{name}, strict": rule.with_dial(rule.dial.low) for name, rule in GREEDY.items() if rule.dial}


@pytest.mark.parametrize("limit", [None, 0.0, 0.15, 0.6])
def test_greedy_rows_of_every_rule_are_verified_as_each_would_be_alone(limit):
    block = rows([0.0] * R)
    block.verifier[::5, :, 2] = -torch.inf  # forbidden by a processor
    block.verifier[3, 1] = block.verifier[3, 1].round()  # ties
    block.context = {"position": torch.arange(R * T).view(R, T)}
    for name, rule in GREEDY.items():
        spent = torch.tensor([0.02 * (row % 3) for row in range(R)], dtype=torch.float64)
        together = verify(block, [RowSettings(rule, limit, float(one)) for one in spent], None)
        for row in range(R):
            one = slice(row, row + 1)
            alone = verify_block(
                rule, block.drafted[one], block.drafter[one], block.verifier[one], temperature=0.0,
                lengths=block.lengths[one], bonus="none", context=Summary({"position": block.context["position"][one]}),
                max_request_loss=None if limit is None else limit, spent=spent[one],
            )  # fmt: skip
            assert together.accepted[row] == alone.accepted[0], name
            assert together.correction[row] == alone.next_token[0], name
            assert torch.equal(together.origin[row], alone.origin[0]), name
            assert torch.equal(together.deferred[row], alone.deferred[0]), name
            if limit is not None and not rule.is_lossless:
                assert together.loss[row] == pytest.approx(float(alone.spent[0] - spent[row])), name
    assert 0 < int(together.accepted.sum()) < int(block.lengths.sum())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_at_their_own_dial_of_one_head_in_one_step(temperature):
    rule = make_rule("learned", head=GapHead(("drafter_max", "kl"), hidden=(4,)), alpha=0.9)
    block, draws = rows([temperature] * R), None if temperature == 0 else numbers()
    strict, lenient = (
        verify(block, [RowSettings(rule.with_dial(alpha))] * R, draws) for alpha in (-0.9, 0.9)
    )
    settings = [RowSettings(rule), RowSettings(rule.with_dial(-0.9))] * (R // 2)
    mixed = verify(block, settings, draws)
    for row in range(R):
        alone = strict if row % 2 else lenient
        assert mixed.accepted[row] == alone.accepted[row]
        assert torch.equal(mixed.deferred[row], alone.deferred[row])
    assert not torch.equal(strict.deferred, lenient.deferred)


def test_without_a_drafter_distribution_a_rule_that_reads_it_is_served_lossless_and_named():
    settings = [RowSettings(make_rule("opt", alpha=0.2)), RowSettings(make_rule("token_v3", alpha=0.5))] * (
        R // 2
    )
    block, draws = rows([1.0] * R, distribution=False), numbers()
    outcome = verify(block, settings, draws)
    needy = [row for row in range(R) if row % 2 == 0]
    assert outcome.unlawful == needy
    lossless = verify(block, [RowSettings()] * R, draws)
    assert torch.equal(outcome.accepted[needy], lossless.accepted[needy])
    assert torch.equal(outcome.correction[needy], lossless.correction[needy])


def test_truncation_reaches_sampling_and_not_decisions():
    block, draws = rows([1.0] * R), numbers()
    kept = block.verifier >= block.verifier.topk(2, dim=-1).values[..., -1:]
    block.sampling = block.verifier.masked_fill(~kept, -torch.inf)
    outcome = verify(block, [RowSettings(make_rule("drafter_only"))] * R, draws)
    emitted = outcome.correction[outcome.correction >= 0]
    places = outcome.accepted[outcome.correction >= 0]
    members = (outcome.correction >= 0).nonzero()[:, 0]
    assert len(emitted) > 0
    assert kept[members, places, emitted].all()
    for row in range(R):
        assert (
            kept[row, : outcome.accepted[row]]
            .gather(1, block.drafted[row, : outcome.accepted[row], None])
            .all()
        )


@pytest.mark.parametrize("neighbours", [0.7, 1.3])
def test_a_distribution_of_half_precision_is_the_one_that_the_tokens_were_drawn_from(neighbours, monkeypatch):
    temperatures = [0.7, neighbours] * (R // 2)
    block, seen = rows(temperatures), {}
    block.drafter = (8 * block.drafter).to(torch.bfloat16)
    scaled = block.drafter.clone().div_(torch.tensor(temperatures).view(-1, 1, 1))  # as vLLM's proposer does
    own = blocks.verify_block
    monkeypatch.setattr(blocks, "verify_block", lambda *a, **k: (seen.update(k), own(*a, **k))[1])
    verify(block, [RowSettings(make_rule("opt", alpha=0.2))] * R, numbers())
    assert torch.equal(seen["drafter_sampling_logits"], scaled)


def test_a_row_that_cannot_be_verified_gets_one_token_and_harms_no_other():
    block, draws = rows([1.0] * R), numbers()
    settings = [RowSettings(make_rule("opt", alpha=0.2))] * R
    clean = verify(block, settings, draws)
    block.verifier[4, 0, 2] = torch.nan
    outcome = verify(block, settings, draws)
    assert outcome.faults == [4]
    assert outcome.accepted[4] == 0
    assert outcome.correction[4] == torch.nan_to_num(block.verifier[4, 0], nan=-1e9).argmax()
    others = [row for row in range(R) if row != 4]
    assert torch.equal(outcome.accepted[others], clean.accepted[others])
    assert torch.equal(outcome.correction[others], clean.correction[others])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_block_that_a_grammar_cut_draws_its_next_token_here(temperature):
    block, draws = rows([temperature] * R), numbers()
    block.lengths = torch.zeros(R, dtype=torch.int64)
    block.cut = list(range(R))
    outcome = verify(
        block, [RowSettings(make_rule("opt", alpha=0.2))] * R, None if temperature == 0 else draws
    )
    assert (outcome.origin[:, 0] == int(Origin.BONUS)).all()
    if temperature == 0:
        assert torch.equal(outcome.correction, block.verifier[:, 0].argmax(-1))
    else:
        distribution = (block.verifier[:, 0].double() / temperature).softmax(-1).cumsum(-1)
        assert torch.equal(
            outcome.correction, torch.searchsorted(distribution, draws[:, -1:].contiguous(), right=True)[:, 0]
        )


def test_counters_add_up_on_every_row():
    counters, block = Counters(), rows([1.0] * R)
    outcome = verify(block, [RowSettings(make_rule("opt", alpha=0.1))] * R, numbers())
    tally(counters, block.lengths.numpy(), outcome, "")
    names = ("kept", "accepted", "rejected", "discarded")
    assert counters.get("drafted") == int(block.lengths.sum()) == sum(counters.get(name) for name in names)
    assert (
        sum(counters.places("passed"))
        == int(outcome.accepted.sum())
        == counters.get("kept") + counters.get("accepted")
    )
    assert sum(counters.places("reached")) == counters.get("rejected") + int(outcome.accepted.sum())
    assert counters.get("rejected") > 0
    assert counters.get("kept") > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("spec", ["opt", "token_v3", "learned"])
def test_what_a_step_launches_depends_neither_on_its_rows_nor_on_their_dials_and_limits(spec, temperature):
    """As both runners have it; V1 copies the verdicts to the host once more, V2 does not."""
    head = {"head": GapHead(("drafter_max", "kl"), hidden=(4,))} if spec == "learned" else {}
    rule, whole, costs = make_rule(spec, alpha=0.5, **head), rows([temperature] * R), []
    whole.lengths = torch.full((R,), T)
    for count in (2, 5, R):
        at = slice(0, count)
        cut = [part[at] for part in (whole.drafted, whole.lengths, whole.verifier)]
        block = DraftedRows(*cut, [temperature] * count, whole.drafter[at], [True] * count)
        settings = [RowSettings(rule.with_dial(0.1 + 0.05 * row), 1.0 + row) for row in range(count)]
        with LaunchCounter() as launches:
            verify(block, settings, None if temperature == 0 else numbers()[at])
        assert launches.host_copies == 0, launches.copies
        costs.append(launches.launches)
    assert len(set(costs)) == 1, costs
