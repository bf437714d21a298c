"""Heads and decoding on a CUDA device, against the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoding.helpers import pair_of, prompts_for
from device.cases import CASES, answers, head_of, summary_on

from deferral_train.decoding import cascade_generate
from deferral_train.heads.rules import learned_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# A judge serves another rule, and what cost_sensitive decides at a price never trained on is anybody's guess.
DECIDING = [case for case in CASES if case[0] not in ("judge", "cost_sensitive")]


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_a_head_answers_as_on_the_cpu(kind: str, stage: str) -> None:
    head = head_of(kind, stage, "isotonic", memory=kind == "gap" and stage == "verify")
    here, there = answers(head, summary_on("cpu")), answers(head, summary_on("cuda"))
    for name, expected in here.items():
        assert there[name].device.type == "cuda"
        if expected.dtype == torch.bool:  # of a price within rounding of the gap either decision is right
            assert (there[name].cpu() != expected).sum() <= 1
        else:
            torch.testing.assert_close(there[name].cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "stage"), DECIDING)
def test_a_head_decides_while_decoding(kind: str, stage: str, dtype: torch.dtype) -> None:
    """Where everything is deferred, the text is the verifier's own."""
    drafter, verifier = (copy.deepcopy(model).to("cuda", dtype) for model in pair_of("llama")[:2])
    inputs = {name: value.to("cuda") for name, value in prompts_for("llama", rows=1).items()}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    own = verifier.generate(**inputs, **options)
    head = head_of(kind, stage)
    text = verifier.generate(
        **inputs, **options, custom_generate=cascade_generate, drafter=drafter, rule=learned_rule(head, -1e4)
    )
    assert head.mean.device.type == "cuda"
    assert head.mean.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(text, own)
