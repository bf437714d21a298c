"""Greedy lossless decoding gives the verifier's own text, token for token, for every supported architecture."""

from __future__ import annotations

import pytest
import torch
from decoding.helpers import generate, pair_of, prompts_for
from tiny_models import KINDS


@pytest.mark.parametrize("drafter", ["never", "always", "sometimes"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_lossless_equals_generate(kind: str, drafter: str) -> None:
    draft_model, verifier, _ = pair_of(kind, drafter)
    inputs = prompts_for(kind, rows=4)
    expected = verifier.generate(**inputs, max_new_tokens=24, do_sample=False)
    result = generate(draft_model, verifier, inputs, "lossless", max_new_tokens=24)
    assert torch.equal(result.sequences, expected)
