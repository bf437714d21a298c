"""Greedy lossless decoding gives the verifier's own text, token for token, for every architecture."""

from __future__ import annotations

import pytest
import torch
from decoding.helpers import draft_without_looking, emitted, generate, pair_of, prompts_for, row_of
from tiny_models import KINDS

from deferral_train.decoding.stepper import Stepper
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
def test_rows_that_wait_for_a_place_give_the_same_text(kind: str, execution: str) -> None:
    draft_model, verifier, _ = pair_of(kind, "sometimes")
    inputs = prompts_for(kind, rows=9)
    expected = verifier.generate(**inputs, max_new_tokens=20, do_sample=False)
    rule = make_rule("chow", alpha=0.0)
    options = {"max_new_tokens": 20, "execution": execution}
    result = generate(draft_model, verifier, inputs, rule, rows_at_once=3, **options)
    assert torch.equal(result.sequences, expected)
    rule = make_rule("chow", alpha=0.5)
    together = generate(draft_model, verifier, inputs, rule, **options)
    alone = generate(draft_model, verifier, row_of(kind, inputs, 2), rule, **options)
    assert emitted(alone, 0) == emitted(together, 2)
    queued = generate(draft_model, verifier, inputs, rule, rows_at_once=3, **options)
    assert torch.equal(together.sequences, queued.sequences)
    assert torch.equal(together.stats.origin, queued.stats.origin)


@pytest.mark.parametrize("kind", ["t5", "llama", "mistral"])
@pytest.mark.parametrize("execution", ["speculative", "token"])
def test_waiting_rows_come_in_where_others_have_ended(
    kind: str, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_model, verifier, _ = pair_of(kind, "sometimes")
    inputs, rule = prompts_for(kind, rows=14), make_rule("chow", alpha=0.5)
    options = {"max_new_tokens": 20, "execution": execution, "max_request_loss": 3.0}
    together = generate(draft_model, verifier, inputs, rule, **options)
    came: list[int] = []
    own = Stepper.exchange
    monkeypatch.setattr(
        Stepper, "exchange", lambda self, places, rows: (came.extend(rows), own(self, places, rows))
    )
    queued = generate(draft_model, verifier, inputs, rule, rows_at_once=4, **options)
    assert came
    assert torch.equal(together.sequences, queued.sequences)
    assert torch.equal(together.stats.origin, queued.stats.origin)
    torch.testing.assert_close(together.stats.spent, queued.stats.spent, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["t5", "llama", "mistral"])
def test_drafting_without_looking_gives_the_same_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on an accelerator: no host copy of the tokens, and drafts that go on past their end."""
    draft_model, verifier, _ = pair_of(kind, "sometimes")
    inputs = prompts_for(kind, rows=6)
    expected = {
        rule: generate(draft_model, verifier, inputs, rule, max_new_tokens=20, rows_at_once=4)
        for rule in ("lossless", "opt")
    }
    draft_without_looking(monkeypatch)
    for rule, before in expected.items():
        result = generate(draft_model, verifier, inputs, rule, max_new_tokens=20, rows_at_once=4)
        assert torch.equal(result.sequences, before.sequences)
        assert torch.equal(result.stats.origin, before.stats.origin)
        assert torch.equal(result.stats.drafted, before.stats.drafted)
