"""Greedy lossless decoding gives the verifier's own text, token for token, for every architecture."""

from __future__ import annotations

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of
from tiny_models import KINDS

from deferral_train.rules import make_rule


@pytest.mark.parametrize("drafter", ["never", "always", "sometimes"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_lossless_equals_generate(kind: str, drafter: str) -> None:
    draft_model, verifier, _ = pair_of(kind, drafter)
    inputs = prompts_for(kind, rows=4)
    expected = verifier.generate(**inputs, max_new_tokens=24, do_sample=False)
    result = generate(draft_model, verifier, inputs, "lossless", max_new_tokens=24)
    assert torch.equal(result.sequences, expected)


@pytest.mark.parametrize("execution", ["speculative", "token", "lazy", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_execution_gives_the_same_text(kind: str, execution: str) -> None:
    draft_model, verifier, _ = pair_of(kind, "sometimes")
    inputs = prompts_for(kind, rows=9)
    expected = verifier.generate(**inputs, max_new_tokens=20, do_sample=False)
    rule = make_rule("chow", alpha=0.0)
    options = {"max_new_tokens": 20, "execution": execution}
    result = generate(draft_model, verifier, inputs, rule, **options)
    assert torch.equal(result.sequences, expected)
    rule = make_rule("chow", alpha=0.5)
    together = generate(draft_model, verifier, inputs, rule, **options)
    alone = generate(draft_model, verifier, row_of(kind, inputs, 2), rule, **options)
    assert emitted(alone, 0) == emitted(together, 2)
