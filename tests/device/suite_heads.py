"""Heads of every type follow a summary to its device, and decide there as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device import pretend_device
from device.cases import CASES, ROWS, VOCABULARY, answers, head_of, summary_on

from deferral_train.decoding.stopping import AcceptanceStop, DraftStep, ExpectedSpeedStop, HeadStop
from deferral_train.heads.rules import judge_rule, learned_rule

pretend_device.install()


@pytest.mark.parametrize("recalibration", ["none", "platt", "isotonic"])
@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_a_head_answers_on_the_device_as_on_the_cpu(kind: str, stage: str, recalibration: str) -> None:
    head = head_of(kind, stage, recalibration, memory=kind == "gap" and stage == "verify")
    here = answers(head, summary_on("cpu"))
    there = answers(head, summary_on("sim:1"))
    assert here.keys() == there.keys()
    for name, expected in here.items():
        assert there[name].device == torch.device("sim:1")
        torch.testing.assert_close(there[name].cpu(), expected)
    again = answers(head, summary_on("cpu"))  # and back: who shares a head is not surprised
    assert all(torch.equal(again[name], expected) for name, expected in here.items())


@pytest.mark.parametrize(("kind", "stage"), [case for case in CASES if case[0] not in ("judge", "token_gap")])
def test_its_rule_decides_alike(kind: str, stage: str) -> None:
    rule = learned_rule(head_of(kind, stage), 0.05, tokenwise=False)
    expected = rule.defer(summary_on("cpu"))
    assert torch.equal(rule.defer(summary_on("sim")).cpu(), expected)


def test_a_token_rule_drops_alike() -> None:
    head = head_of("token_gap", "verify")
    generator = torch.Generator().manual_seed(1)
    q, p = torch.randn(2, ROWS, VOCABULARY, generator=generator).log_softmax(-1)
    costs = head.token_gap(None, q, p, summary_on("cpu"))
    rule = learned_rule(head, 3 * float(costs.median()))  # a price at which some tokens stay and some do not
    here = rule.keep(q, p, summary_on("cpu"))
    there = rule.keep(q.to("sim"), p.to("sim"), summary_on("sim"))
    assert there.device == torch.device("sim:0")
    assert torch.equal(there.cpu(), here)
    assert 0 < int(here.sum()) < here.numel()


def test_a_judge_approves_alike() -> None:
    rule = judge_rule(head_of("judge", "verify"), 0.5)
    assert torch.equal(rule.approved(summary_on("sim")).cpu(), rule.approved(summary_on("cpu")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_computes_in_float32_beside_half_models(dtype: torch.dtype) -> None:
    head = head_of("gap", "verify")
    summary = summary_on("sim", dtype)
    assert head.columns(summary).dtype == torch.float32
    expected = copy.deepcopy(head).cpu().gap(summary_on("cpu", dtype))
    torch.testing.assert_close(head.gap(summary).cpu(), expected)
    with torch.autocast("sim", dtype=dtype):
        assert head.body(head.prepare(head.columns(summary))).dtype == dtype  # what a trainer asks for
        torch.testing.assert_close(head.gap(summary).cpu(), expected)


def test_a_head_moved_while_decoding_can_still_be_trained() -> None:
    head = head_of("gap", "verify")
    with torch.inference_mode():
        head.gap(summary_on("sim"))
    assert head.mean.device == torch.device("sim:0")
    head(head.columns(summary_on("sim")))["gap"].sum().backward()
    assert head.body[0].weight.grad is not None


@pytest.mark.parametrize("kind", ["acceptance", "head", "speed"])
def test_stops_decide_alike(kind: str) -> None:
    def decisions(device: str) -> list[list[bool]]:
        stop: Any = {
            "acceptance": lambda: AcceptanceStop(head_of("judge", "draft"), 0.7),
            "head": lambda: HeadStop(head_of("gap", "draft"), 0.1, 0.3),
            "speed": lambda: ExpectedSpeedStop(0.2, head_of("gap", "draft"), 0.1),
        }[kind]()
        generator = torch.Generator().manual_seed(1)
        found = []
        for place in range(3):
            logits = 2 * torch.randn(4, VOCABULARY, generator=generator)
            token = logits.argmax(-1).to(device)
            step = DraftStep(
                place, token, logits.to(device), None, 1.0, None, (7, 8, 9, 10), lambda _, token=token: token
            )
            found.append(stop.stops(step).tolist())
        return found

    assert decisions("sim") == decisions("cpu")
