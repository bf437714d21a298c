"""The V2 runner's step without an engine: whose rows are written over, by what, and when it is counted."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deferral_train.rules import make_rule, verify_block
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import SCALARS, Counters
from deferral_train.serving.random_numbers import block_numbers
from deferral_train.serving.runner_v2 import EngineRows, SeamV2

sys.path.insert(0, str(Path(__file__).parents[1]))
from launches import LaunchCounter

V, T, SLOTS = 9, 3, 8
SPEC = "opt:alpha=0.2"
LAUNCHES = (150, 206)  # of a step's verdicts, greedy and sampled
SETTINGS = (
    4  # what rows with dials and limits of their own add: two copies to the device, whatever their number
)


@pytest.fixture
def seam():
    return made()


def made(**settings):
    config = ServingConfig.parse({"rule": SPEC, **settings})
    seeds = SimpleNamespace(gpu=torch.arange(SLOTS) * 1_000_003 - 7)
    sampler = SimpleNamespace(sampler=SimpleNamespace(sampling_states=SimpleNamespace(seeds=seeds)))
    runner = SimpleNamespace(device=torch.device("cpu"), rejection_sampler=sampler)
    seam = SeamV2(runner, config, config.make_rule(), [], Counters(), None, 0)
    seam.sampler = sampler
    return seam


def scheduled(seam, new=(), ended=(), drafted=()):
    """Tell the seam of a step: `new` are (name, temperature, extra arguments)."""
    told = [
        SimpleNamespace(
            req_id=name, sampling_params=SimpleNamespace(temperature=t, extra_args=extra), prompt_len=4
        )
        for name, t, extra in new
    ]
    seam.schedule(
        SimpleNamespace(
            finished_req_ids=set(ended), scheduled_new_reqs=told, scheduled_spec_decode_tokens=dict.fromkeys(drafted)
        )
    )  # fmt: skip


def step(seam, names, drafts, slots=None, seed=0, withdrawn=(), counter=None):
    """One call of the engine's verification; returns what it was given and holds what was decided."""
    generator = torch.Generator().manual_seed(seed)
    slots = np.arange(len(names)) if slots is None else np.array(slots)
    ends = np.concatenate([[0], np.cumsum(np.array(drafts) + 1)])
    verifier = torch.randn(int(ends[-1]), V, generator=generator) * 1.5
    draft_logits = torch.randn(SLOTS, T, V, generator=generator)
    drafted = torch.full((int(ends[-1]),), 7, dtype=torch.int32)
    for row, (slot, count) in enumerate(zip(slots, drafts)):
        draft_logits[slot, :count] += verifier[ends[row] : ends[row] + count]
        if count:
            drawn = draft_logits[slot, :count].softmax(-1).multinomial(1, generator=generator)[:, 0]
            drafted[ends[row] + 1 : ends[row + 1]] = drawn.int()
    for place in withdrawn:
        drafted[place] = -1
    engine = EngineRows(
        verifier, verifier, verifier, drafted, draft_logits, 10 + torch.arange(len(drafted)), slots,
        torch.full((len(names), T + 1), 8), torch.full((len(names),), 2, dtype=torch.int32),
    )  # fmt: skip
    seam.begin(SimpleNamespace(idx_mapping_np=slots, req_ids=list(names), cu_num_logits_np=ends))
    members = seam.members(slots)
    if members is not None:
        with counter or contextlib.nullcontext():
            seam.decide(members, engine)
    return engine, ends


def alone(engine, ends, row, rule, temperature, count, **more):
    """The verdict of one row by `verify_block` itself, with the numbers of its seed and places."""
    at = slice(ends[row], ends[row] + count + 1)
    slot = int(engine.slots[row])
    seeds = (torch.arange(SLOTS) * 1_000_003 - 7)[slot : slot + 1]
    # The block's last number belongs to the place where the block begins, however wide the step is.
    numbers = block_numbers(seeds, engine.pos[at][None])
    return verify_block(
        rule, engine.drafted[ends[row] + 1 : ends[row] + 1 + count][None].long(),
        engine.draft_logits[slot : slot + 1, :count], engine.decision[at][None], temperature=temperature,
        numbers=numbers, bonus="verifier", **more,
    )  # fmt: skip


def counted(seam):
    seam.drain()
    return {name: seam.counters.get(name) for name in SCALARS}


def test_rows_with_a_rule_are_written_over_as_each_would_be_alone_and_no_others(seam):
    new = [
        ("ruled", 1.0, None), ("lossless", 1.0, {"deferral_lossless": 1}), ("greedy", 0.0, None),
        ("dialled", 0.7, {"deferral_dial": 0.9}), ("prefill", 1.0, None),
    ]  # fmt: skip
    drafts = [3, 3, 3, 2, 0]
    kept = rejected = 0
    for seed in range(12):
        scheduled(seam, new if not seed else (), drafted=["ruled", "lossless", "greedy", "dialled"])
        engine, ends = step(seam, [name for name, *_ in new], drafts, slots=[5, 0, 3, 7, 1], seed=seed)
        for row in (1, 4):
            assert engine.tokens[row].tolist() == [8] * (T + 1)
            assert engine.count[row] == 2
        for row, rule, temperature in (
            (0, make_rule("opt", alpha=0.2), 1.0),
            (2, make_rule("opt", alpha=0.2), 0.0),
            (3, make_rule("opt", alpha=0.9), 0.7),
        ):
            verdict = alone(engine, ends, row, rule, temperature, drafts[row])
            accepted = int(verdict.accepted)
            drafted = engine.drafted[ends[row] + 1 : ends[row] + 1 + accepted].tolist()
            assert engine.count[row] == accepted + 1
            assert engine.tokens[row, : accepted + 1].tolist() == [*drafted, int(verdict.next_token)]
            kept += int(verdict.kept[:, :accepted].sum())
            rejected += accepted < drafts[row]
    found = counted(seam)
    assert (found["blocks"], found["drafted"]) == (36, 12 * 8)
    assert (found["kept"], found["rejected"]) == (kept, rejected)
    assert found["drafted"] == found["kept"] + found["accepted"] + found["rejected"] + found["discarded"]
    assert (found["requests"], found["refused_asked"], found["steps"]) == (5, 1, 12)
    seam.check_consulted()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_withdrawn_draft_ends_its_block_and_the_next_token_is_the_verifiers_there(seam, temperature):
    scheduled(
        seam, [("a", temperature, {"deferral_dial": 50.0}), ("b", temperature, {"deferral_dial": 50.0})]
    )
    engine, _ = step(seam, ["a", "b"], [3, 3], withdrawn=[2, 5])  # a's second draft, b's first
    assert engine.count.tolist() == [2, 1]
    assert engine.tokens[0, 0] == engine.drafted[1]
    emitted = [int(engine.tokens[0, 1]), int(engine.tokens[1, 0])]
    for row, place, token in ((0, 1, emitted[0]), (1, 4, emitted[1])):
        distribution = engine.decision[place].softmax(-1)
        if temperature == 0:
            assert token == int(distribution.argmax())
        else:
            seeds = (torch.arange(SLOTS) * 1_000_003 - 7)[row : row + 1]
            number = block_numbers(seeds, engine.pos[4 * row : 4 * row + 4][None])[0, -1]
            assert token == int(torch.searchsorted(distribution.double().cumsum(-1), number, right=True))
    assert (counted(seam)["blocks"], counted(seam)["drafted"]) == (1, 1)


def test_spending_survives_preemption_in_another_slot_and_ends_with_the_request():
    seam = made(max_request_loss=0.5)
    spent = 0.0
    for seed in range(8):
        scheduled(
            seam, [("a", 1.0, {"deferral_dial": 50.0})], drafted=["a"]
        )  # new again after each preemption
        engine, ends = step(seam, ["a"], [3], slots=[seed % SLOTS], seed=seed)
        verdict = alone(
            engine, ends, 0, make_rule("opt", alpha=50.0), 1.0, 3, max_request_loss=0.5,
            spent=torch.tensor([spent], dtype=torch.float64),
        )  # fmt: skip
        spent = float(verdict.spent)
        assert engine.count[0] == int(verdict.accepted) + 1
        seam.drain()
        assert seam.requests["a"].settings.spent == pytest.approx(spent)
    assert 0.3 < spent <= 0.5
    assert counted(seam)["requests"] == 1
    scheduled(seam, [("b", 1.0, {"deferral_dial": 50.0})], ended=["a"])
    assert "a" not in seam.requests
    step(seam, ["b"], [3], slots=[0])
    assert list(seam._account_of) == ["b"]
    assert (
        0
        < counted(seam)["estimated_loss"] - spent
        == pytest.approx(float(seam._accounts[seam._account_of["b"]]))
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_costs_the_same_launches_whatever_its_rows_and_no_copy_to_the_host(temperature):
    """Of rows that share rule, limit and kind of sampling; the engine's own verification is not counted."""
    costs = []
    for rows in (1, 2, 7):
        seam, names = made(), [f"r{row}" for row in range(rows)]
        scheduled(seam, [(name, temperature, None) for name in names], drafted=names)
        step(seam, names, [3] * rows)  # opens the accounts
        count = LaunchCounter()
        step(seam, names, [3] * rows, seed=1, counter=count)
        assert count.host_copies == 0, count.copies
        costs.append(count.launches)
    assert len(set(costs)) == 1, costs
    assert costs[0] <= LAUNCHES[temperature > 0], count.operators


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("spec", [SPEC, "token_v3:alpha=0.3", "token_v1:alpha=0.3"])
def test_a_step_costs_the_same_launches_whatever_the_dials_and_limits_of_its_rows(spec, temperature):
    costs = []
    for rows in (2, 5, 8):
        seam, names = made(rule=spec), [f"r{row}" for row in range(rows)]
        own = [
            {"deferral_dial": 0.1 + 0.05 * row, "deferral_max_request_loss": 1.0 + row} for row in range(rows)
        ]
        scheduled(seam, [(name, temperature, one) for name, one in zip(names, own)], drafted=names)
        step(seam, names, [3] * rows)
        count = LaunchCounter()
        step(seam, names, [3] * rows, seed=1, counter=count)
        assert count.host_copies == 0, count.copies
        costs.append(count.launches)
    assert len(set(costs)) == 1, costs
    alike = made(rule=spec)
    scheduled(alike, [(name, temperature, None) for name in names], drafted=names)
    step(alike, names, [3] * rows)
    count = LaunchCounter()
    step(alike, names, [3] * rows, seed=1, counter=count)
    assert costs[0] <= count.launches + SETTINGS, (costs, count.launches)


def test_accounts_grow_and_are_used_again():
    seam = made(max_request_loss=1e9)
    for number in range(1030):
        seam._account(f"r{number}")
    assert len(set(seam._account_of.values())) == 1030
    assert len(seam._accounts) == 2048
    seam._accounts[:] = 5.0
    seam.close_requests([f"r{number}" for number in range(1030)])
    assert float(seam._accounts[seam._account("again")]) == 0.0


def test_verdicts_are_settled_a_step_later_in_their_order_and_nothing_is_waited_for(seam):
    class Event:
        arrived = waited = False

        def query(self):
            return self.arrived

        def synchronize(self):
            self.waited = True

    scheduled(seam, [("a", 1.0, None), ("b", 1.0, None)])
    closed = []
    seam.shadow_sums.finished = closed.append
    events = []
    for seed in range(3):
        step(seam, ["a" if seed < 2 else "b"], [3], seed=seed)
        events.append(Event())
        seam._pending[-1].event = events[-1]
        if seed == 0:
            scheduled(seam, drafted=["a"])
            assert seam.counters.get("blocks") == 0  # still under way, and left alone
        if seed == 1:
            scheduled(seam, ended=["a"])
            assert events[0].waited  # two steps late: the older one is waited for
            assert seam.counters.get("blocks") == 1
            assert closed == [[]]  # the end of a request comes after its last verdicts
    events[1].arrived = events[2].arrived = True
    scheduled(seam)
    assert seam.counters.get("blocks") == 3
    assert ["a"] in closed
    assert not any(event.waited for event in events[1:])


def test_a_step_in_which_nobody_has_a_rule_is_the_engines(seam):
    scheduled(seam, [("a", 1.0, {"deferral_lossless": 1}), ("_warmup_0_", 1.0, None)])
    engine, _ = step(seam, ["a", "_warmup_0_"], [3, 3])
    assert (engine.tokens == 8).all()
    assert counted(seam)["engine_steps"] == 1
    assert counted(seam)["requests"] == 1


def test_shadow_writes_nothing_and_counts_both():
    seam = made(mode="shadow")
    scheduled(seam, [("a", 1.0, {"deferral_dial": 50.0})])
    engine, _ = step(seam, ["a"], [3])
    assert (engine.tokens == 8).all()
    found = counted(seam)
    assert (found["accepted"], found["rejected"], found["kept"]) == (
        1,
        1,
        0,
    )  # what the engine's two tokens say
    assert found["shadow_kept"] == 3


@pytest.mark.parametrize("shadow", [False, True])
def test_a_request_whose_loss_per_token_leaves_the_band_is_lossless_from_there_on(shadow):
    mode = {"mode": "shadow"} if shadow else {}
    seam = made(guard=[0.0, 0.1], guard_after=6, **mode)
    scheduled(seam, [("bold", 1.0, {"deferral_dial": 50.0}), ("shy", 1.0, {"deferral_dial": -50.0})])
    for seed in range(4):
        scheduled(seam)
        before = seam.requests["bold"]
        if before.refused is None:
            judged, spent = before.judged, before.settings.spent
            assert judged < 6 or spent / judged <= 0.1
        engine, _ = step(seam, ["bold", "shy"], [3, 3], seed=seed)
        if before.refused is not None:
            assert engine.tokens[0].tolist() == [8] * (T + 1)
    found = counted(seam)
    assert found["refused_guard"] == 1
    assert (seam.requests["bold"].refused, seam.requests["shy"].refused) == ("guard", None)
    bold = seam.requests["bold"]
    assert bold.settings.spent / bold.judged > 0.1
    assert 6 <= bold.judged < 4 * 4


def test_random_numbers_are_those_of_the_published_mixer_and_fill_the_interval_evenly():
    from scipy.stats import chisquare

    from deferral_train.serving.random_numbers import GOLDEN, _mixed

    # SplitMix64 from state 0 (Vigna's reference splitmix64.c): its first two outputs.
    assert int(_mixed(torch.tensor(0))) % 2**64 == 0xE220A8397B1DCDAF
    assert int(_mixed(torch.tensor(GOLDEN - 2**64))) % 2**64 == 0x6E789E6AA1B965F4
    seeds = torch.randint(-(2**62), 2**62, (4000,), generator=torch.Generator().manual_seed(0))
    numbers = block_numbers(seeds, torch.arange(T + 1).expand(4000, T + 1))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        cells = torch.histc(column, 20, 0, 1)
        assert chisquare(cells.numpy()).pvalue > 1e-6
    off = torch.corrcoef(numbers.T) - torch.eye(T + 1)
    assert off.abs().max() < 5 / 4000**0.5
    # The same places give the same numbers, and another place others.
    assert torch.equal(numbers[:7], block_numbers(seeds[:7], torch.arange(T + 1).expand(7, T + 1)))
    assert not torch.equal(numbers[:7], block_numbers(seeds[:7], 1 + torch.arange(T + 1).expand(7, T + 1)))
