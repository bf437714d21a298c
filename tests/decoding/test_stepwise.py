"""Models that are read one token at a time: without a cache, recurrent, hybrid; in either place, in every execution."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from decoding.small import IDS, LEFT, LLM, ONE, TWO, cascade, llama, made, near, own

from deferral_train.decoding.drafting import DraftCascade, MaxGram, Plan
from deferral_train.decoding.facts import facts_of
from deferral_train.errors import InputError
from deferral_train.rules import LearnedRule, make_rule

INPUTS = {"one": ONE, "two": TWO, "ragged": LEFT}


@cache
def model(kind: str) -> Any:
    if kind == "openai-gpt":
        return made(tf.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=2, n_positions=128, **IDS))
    if kind == "mamba":
        return made(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **IDS))
    layers = ["linear_attention", "full_attention"]
    return made(
        tf.MiniMaxConfig(**LLM, layer_types=layers, num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    )


KINDS = ("openai-gpt", "mamba", "minimax")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("drafts", [1, 5])
def test_its_text_is_its_own_generate_s(kind: str, which: str, drafts: int) -> None:
    verifier, inputs = model(kind), INPUTS[which]
    assert facts_of(verifier).stepwise
    expected = own(verifier, inputs)
    for drafter in (near(verifier), verifier, llama(1)):
        assert torch.equal(cascade(verifier, inputs, drafter, num_draft_tokens=drafts), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", INPUTS)
def test_it_drafts_for_a_model_with_a_cache(kind: str, which: str) -> None:
    verifier, inputs = llama(), INPUTS[which]
    assert torch.equal(cascade(verifier, inputs, model(kind)), own(verifier, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("execution", ["token", "lazy", "sequence"])
def test_every_execution(kind: str, execution: str) -> None:
    verifier, rule = model(kind), make_rule("chow", alpha=0.0)
    found = cascade(verifier, LEFT, near(verifier), rule=rule, execution=execution)
    assert torch.equal(found, own(verifier, LEFT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cascade_of_drafters_over_one_row(kind: str) -> None:
    verifier = model(kind)
    plan = DraftCascade([near(verifier)], Plan(((2, 4), (0, 3)), max_gram=MaxGram()))
    assert torch.equal(cascade(verifier, ONE, plan), own(verifier, ONE))
    with pytest.raises(InputError, match="is read one token at a time"):
        cascade(verifier, TWO, plan)


def test_rejected_drafts_leave_nothing_behind() -> None:
    verifier = model("mamba")
    found = cascade(verifier, TWO, llama(1), num_draft_tokens=4, return_dict_in_generate=True)
    assert int(found.stats.rejected.sum()) > 5
    assert torch.equal(found.sequences, own(verifier, TWO))
    # A prompt, and for every block its drafts and one token more: rolling back feeds nothing again.
    blocks = int(found.stats.verifier_calls.max())
    assert found.stats.verifier_passes <= blocks * 5


class Head:
    """A draft-stage head over hidden states alone."""

    features = ("drafter_hidden", "verifier_hidden")
    stage = "verify"

    def gap(self, summary: Any) -> torch.Tensor:
        return summary["drafter_hidden"].mean(dim=-1) + summary["verifier_hidden"].sum(dim=-1)


@pytest.mark.parametrize("drafts", [1, 4])
def test_hidden_states_are_those_of_each_place(drafts: int) -> None:
    # With an exact bonus the text is the token cascade's, whatever the block: a head that read other places would
    # decide otherwise.
    verifier, rule = model("mamba"), LearnedRule(head=Head(), alpha=0.0)
    single = cascade(verifier, TWO, near(verifier), rule=rule, execution="token")
    assert not torch.equal(single, own(verifier, TWO))
    found = cascade(verifier, TWO, near(verifier), rule=rule, num_draft_tokens=drafts, bonus="exact")
    assert torch.equal(found, single)
