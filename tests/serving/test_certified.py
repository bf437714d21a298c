"""What serving makes of a certificate: other weights or pair are served lossless, other conditions served and said."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from deferral_train import DeferralHead
from deferral_train.heads import GapHead, set_operating_point
from deferral_train.serving import checks
from deferral_train.serving.attach import announce
from deferral_train.serving.checks import check_conditions, check_heads
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import Counters
from deferral_train.serving.requests import Requests
from deferral_train.serving.seam import Seam

PAIR = {
    "drafter": {"config": "a", "weights": "b"},
    "verifier": {"config": "c", "weights": "d"},
    "tokenizer": "t",
    "vocab_size": 40,
    "dtype": {"drafter": "float32", "verifier": "float32"},
}
ENGINE = "vllm 0.32.0"
CERTIFICATE = {
    "metric": "chrf", "limit": 0.02, "parameter": "alpha", "value": 0.2, "temperature": 0.0,
    "engine": ENGINE, "dtype": {"drafter": "float32", "verifier": "float32"}, "pair": PAIR,
}  # fmt: skip


def engine(dtype=torch.float32, quantization=None):
    model = SimpleNamespace(dtype=dtype, quantization=quantization)
    return SimpleNamespace(model_config=model, speculative_config=SimpleNamespace(draft_model_config=model))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A rule of a head folder with the given certificate, in an engine that serves PAIR."""
    monkeypatch.setattr(checks, "describe_pair", lambda _: PAIR)

    def make(certificate=CERTIFICATE, **pair):
        torch.manual_seed(0)
        head = GapHead(["drafter_max", "verifier_max"], hidden=[4])
        head.metadata = {"pair": {**PAIR, **pair}}
        head.save_pretrained(tmp_path / "head")
        if certificate is not None:
            set_operating_point(tmp_path / "head", certificate["value"], certificate)
        return ServingConfig(head=str(tmp_path / "head"), alpha=0.2), tmp_path / "head"

    return make


def test_the_certified_engine_is_served_without_a_word(served):
    config, _ = served()
    rule = config.make_rule()
    assert check_heads(rule, engine()) == []
    assert check_conditions(rule, engine(), ENGINE) == []


@pytest.mark.parametrize(
    ("certificate", "here", "said"),
    [
        (
            {**CERTIFICATE, "engine": "transformers 5.23"},
            {},
            "certified on engine transformers 5.23, running vllm 0.32.0",
        ),
        (CERTIFICATE, {"dtype": torch.bfloat16}, "certified on dtype float32, running bfloat16"),
        (CERTIFICATE, {"quantization": "fp8"}, "certified on quantization nothing recorded, running fp8"),
        (
            {k: v for k, v in CERTIFICATE.items() if k != "engine"},
            {},
            "certified on engine nothing recorded, running vllm",
        ),
        ({**CERTIFICATE, "value": 0.1}, {}, "certified on alpha 0.1, running 0.2"),
    ],
)
def test_other_conditions_are_served_said_and_counted(served, caplog, certificate, here, said):
    config, _ = served(certificate)
    rule, place = config.make_rule(), engine(**here)
    assert check_heads(rule, place) == []
    conditions = check_conditions(rule, place, ENGINE)
    assert len(conditions) == 1
    assert conditions[0].startswith(said)
    with caplog.at_level(logging.WARNING, logger="vllm.deferral_train"):
        logging.getLogger("vllm.deferral_train").propagate = True
        announce(config, rule, [], conditions)
    assert conditions[0] in caplog.text
    counters = counted(config, rule, [], conditions)
    assert counters.get("uncertified") == 1
    assert counters.get("refused_pair") == 0


def counted(config, rule, mismatch, conditions) -> Counters:
    """One greedy request through the seam's own way of meeting requests."""
    params = SimpleNamespace(temperature=0.0, extra_args=None)
    seam = Seam.__new__(Seam)
    seam.counters, seam.logger = Counters(), None
    seam.requests = Requests(config, rule, mismatch)
    seam.requests.conditions = list(conditions)
    seam.admit(SimpleNamespace(req_id="a", sampling_params=params, prompt_len=2))
    return seam.counters


def test_weights_that_were_not_certified_are_served_lossless_and_counted(served):
    config, folder = served()
    head = DeferralHead.from_pretrained(folder)
    with torch.no_grad():
        next(head.parameters()).view(-1)[0] += 1
    save_file(head.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    rule = config.make_rule()
    mismatch = check_heads(rule, engine())
    assert len(mismatch) == 1
    assert "the certified ones" in mismatch[0]
    counters = counted(config, rule, mismatch, [])
    assert counters.get("refused_pair") == 1


@pytest.mark.parametrize("where", ["certificate", "head"])
def test_another_pair_is_served_lossless(served, where):
    other = {"verifier": {"config": "c", "weights": "e"}}
    config, _ = (
        served({**CERTIFICATE, "pair": {**PAIR, **other}}) if where == "certificate" else served(**other)
    )
    mismatch = check_heads(config.make_rule(), engine())
    assert len(mismatch) == 1
    assert "verifier weights is d, the head's e" in mismatch[0]


def test_a_head_without_a_certificate_says_the_format_it_was_fitted_on(served):
    config, _ = served(None)
    rule = config.make_rule()
    assert check_heads(rule, engine()) == []
    assert check_conditions(rule, engine(), ENGINE) == []
    assert check_conditions(rule, engine(torch.bfloat16), ENGINE) == [
        "fitted on dtype float32, running bfloat16"
    ]
