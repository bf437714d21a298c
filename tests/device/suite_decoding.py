"""Decoding gives on the pretend accelerator what it gives on the CPU: rules, executions, heads, stops, cascades."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from decoding.helpers import prompts_for
from device import pretend_device
from device.cases import head_of
from rules.instances import build
from tiny_models import tiny_pair

from deferral_train.decoding import CascadeOutput, Pair, cascade_generate
from deferral_train.decoding.drafting import DraftCascade, GivenDraft, MaxGram, Plan
from deferral_train.decoding.stopping import AcceptanceStop, ConfidenceStop, ExpectedSpeedStop, HeadStop
from deferral_train.heads import HEADS
from deferral_train.heads.rules import judge_rule, learned_rule
from deferral_train.pairs.load import make_pair
from deferral_train.rules import RULES, make_rule

pretend_device.install()

CPU, SIM = "cpu", "sim"
TOKENS = 6
# A dial in the middle of what these pairs' confidences are, so that each rule keeps some tokens and defers others.
DIALS: dict[str, dict[str, Any]] = {
    "lossy": {"alpha": 0.3}, "lenient": {"alpha": 0.3}, "bild": {"alpha": 1.3}, "chow": {"alpha": 0.4},
    "chow_log": {"alpha": 1.2}, "diff": {"alpha": 0.1}, "diff_log": {"alpha": 0.3}, "opt": {"alpha": 0.1},
    "opt_log": {"alpha": 0.3}, "opt_verifier": {"alpha": 0.2}, "token_v1": {"alpha": 0.1}, "token_v2": {"alpha": 0.1},
    "token_v3": {"alpha": 0.4}, "ensemble": {"weight": 0.4}, "typical": {"epsilon": 0.1}, "judge": {"threshold": 0.4},
}  # fmt: skip


@cache
def pair_of(kind: str, how: str = "sometimes") -> tuple[Any, Any, Any]:
    """A pair of one layer each: what a layer does is the same on both devices."""
    return tiny_pair(kind, 3, how, layers=1)


@cache
def model_on(kind: str, role: str, device: str) -> Any:
    """One of a tiny pair's models, copied to a device once."""
    model = pair_of(kind)[role == "verifier"]
    return model if device == CPU else copy.deepcopy(model).to(device)


def run(
    rule: Any = "lossless",
    *,
    devices: tuple[str, str] = (SIM, SIM),
    kind: str = "llama",
    temperature: float = 0.0,
    drafter: Any = None,
    **options: Any,
) -> CascadeOutput:
    """One call, its drafter and verifier on these devices, its random numbers from the verifier's."""
    verifier = model_on(kind, "verifier", devices[1])
    inputs = {name: value.to(devices[1]) for name, value in prompts_for(kind, rows=2).items()}
    sampling = {"do_sample": False}
    if temperature:
        generator = torch.Generator(devices[1]).manual_seed(5)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "generator": generator}
    return verifier.generate(
        **inputs,
        **{
            "max_new_tokens": TOKENS,
            "num_draft_tokens": 3,
            "return_dict_in_generate": True,
            **sampling,
            **options,
        },
        custom_generate=cascade_generate,
        drafter=model_on(kind, "drafter", devices[0]) if drafter is None else drafter(devices[0]),
        rule=rule,
    )


def check(rule: Any = "lossless", devices: tuple[str, str] = (SIM, SIM), **options: Any) -> None:
    """The call gives on these devices what it gives on the CPU: tokens, origins and counts."""
    made = {
        name: options.pop(name) for name in ("stop",) if name in options
    }  # a stop keeps state: one per call
    expected = run(rule, devices=(CPU, CPU), **options, **{name: make() for name, make in made.items()})
    found = run(rule, devices=devices, **options, **{name: make() for name, make in made.items()})
    assert found.sequences.device == torch.device(devices[1], None if devices[1] == CPU else 0)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    assert torch.equal(found.stats.origin.cpu(), expected.stats.origin.cpu())
    for name in ("drafted", "kept", "accepted", "rejected"):
        assert torch.equal(getattr(found.stats, name).cpu(), getattr(expected.stats, name).cpu()), name
    assert int(expected.stats.drafted.sum()) > 0 or expected.stats.verifier_passes >= TOKENS


def rule_of(name: str) -> Any:
    return build(name, DIALS.get(name, {}))


@pytest.mark.parametrize("name", RULES)
def test_every_rule(name: str) -> None:
    for temperature in (0.0, 0.7, 1.0):
        check(rule_of(name), temperature=temperature)


@pytest.mark.parametrize("devices", [(CPU, SIM), (SIM, CPU), ("sim:1", SIM)])
@pytest.mark.parametrize("name", ["lossless", "opt", "token_v3", "judge"])
def test_drafter_and_verifier_on_two_devices(name: str, devices: tuple[str, str]) -> None:
    for temperature in (0.0, 1.0):
        check(rule_of(name), devices, temperature=temperature)


@pytest.mark.parametrize("devices", [(SIM, SIM), (CPU, SIM)])
def test_encoder_decoder(devices: tuple[str, str]) -> None:
    for rule, temperature in (("lossless", 0.0), (rule_of("opt"), 1.0)):
        check(rule, devices, kind="t5", temperature=temperature)


@pytest.mark.parametrize("execution", ["token", "lazy", "sequence"])
def test_every_execution(execution: str) -> None:
    rules = [rule_of("chow")]
    if execution != "sequence":  # which asks about a whole text
        rules.append(learned_rule(head_of("gap", "draft"), 0.05))
    for rule in rules:
        for temperature in (0.0, 1.0):
            check(rule, execution=execution, temperature=temperature)


HEAD_RULES = {
    f"{kind}_{stage}": (kind, stage)
    for kind in HEADS
    for stage in ("verify", "draft")
    if kind != "judge" and (stage == "verify" or kind in ("gap", "cost_sensitive"))
}


@pytest.mark.parametrize("name", HEAD_RULES)
def test_every_head(name: str) -> None:
    for temperature in (0.0, 0.7, 1.0):
        check(learned_rule(head_of(*HEAD_RULES[name]), 0.05), temperature=temperature)


@pytest.mark.parametrize("name", HEAD_RULES)
def test_every_head_beside_a_drafter_on_the_cpu(name: str) -> None:
    check(learned_rule(head_of(*HEAD_RULES[name]), 0.05), (CPU, SIM), temperature=1.0)


def test_heads_with_memory_and_recalibration_and_token_rules() -> None:
    check(learned_rule(head_of("gap", "verify", "isotonic", memory=True), 0.05), temperature=0.7)
    for priced in (False, True):
        check(learned_rule(head_of("token", "verify"), 0.05, priced=priced), temperature=float(priced))
    check(judge_rule(head_of("judge", "verify"), 0.5), temperature=1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_loss_limits(temperature: float) -> None:
    for rule in (rule_of("opt"), learned_rule(head_of("gap", "verify"), 0.05)):
        check(rule, max_request_loss=0.3, temperature=temperature)
    check(rule_of("opt"), max_request_loss=0.3, temperature=temperature, bonus="exact")
    check(rule_of("chow"), max_request_loss=0.3, temperature=temperature, execution="token")


@pytest.mark.parametrize("devices", [(SIM, SIM), (CPU, SIM)])
@pytest.mark.parametrize("kind", ["confidence", "acceptance", "head", "speed"])
def test_stops(kind: str, devices: tuple[str, str]) -> None:
    stops = {
        "confidence": lambda: ConfidenceStop(0.4),
        "acceptance": lambda: AcceptanceStop(head_of("judge", "draft"), 0.7),
        "head": lambda: HeadStop(head_of("gap", "draft"), 0.1, 0.3),
        "speed": lambda: ExpectedSpeedStop(0.2, head_of("gap", "draft"), 0.1),
    }
    for temperature in (0.0, 1.0):
        check(rule_of("opt"), devices, stop=stops[kind], temperature=temperature)


CASCADES = {
    "max_gram": ([[5]], 0),
    "vertical": ([[3, 0], [0, 4]], 1),
    "all": ([[2, 3, 0], [0, 1, 3], [0, 0, 4]], 2),
}


@pytest.mark.parametrize("name", CASCADES)
def test_max_gram_and_cascades_of_drafters(name: str) -> None:
    k, count = CASCADES[name]

    def drafter(device: str) -> DraftCascade:
        models = [
            copy.deepcopy(pair_of("llama", how)[0]).to(device) for how in ("sometimes", "never")[:count]
        ]
        return DraftCascade(models, Plan(k, lenience=1.5, max_gram=MaxGram()))

    rule = "lossless" if name == "max_gram" else rule_of("opt")
    for temperature in (0.0, 1.0):
        check(rule, drafter=drafter, temperature=temperature)


def test_a_given_text() -> None:
    check(rule_of("biased"), drafter=lambda device: GivenDraft([[5, 9, 12], [7, 8]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_beside_half_precision_models(dtype: torch.dtype) -> None:
    found = []
    for device in (CPU, SIM):
        drafter, verifier = (copy.deepcopy(model).to(device, dtype) for model in pair_of("llama")[:2])
        inputs = {name: value.to(device) for name, value in prompts_for("llama", rows=2).items()}
        out = verifier.generate(
            **inputs, do_sample=False, max_new_tokens=TOKENS, custom_generate=cascade_generate, drafter=drafter,
            rule=learned_rule(head_of("gap", "verify"), 0.05),
        )  # fmt: skip
        found.append(out.cpu())
    assert torch.equal(*found)


def test_a_pair_generates_with_settings() -> None:
    texts = []
    for device in (CPU, SIM):
        drafter, verifier, tokenizer = tiny_pair("llama", 3, layers=1)
        pair = Pair(make_pair(drafter.to(device), verifier.to(device), tokenizer))
        rule = learned_rule(head_of("gap", "verify"), 0.05)
        made = pair.generate(["w1 w2 w3", "w4 w9"], rule, max_new_tokens=8, temperature=0.7, seed=1, top_k=20)
        texts.append(made.texts)
    assert texts[0] == texts[1]


def test_make_rule_learned_with_an_object_head() -> None:
    check(make_rule("learned", head=head_of("gap", "verify"), alpha=0.05))
