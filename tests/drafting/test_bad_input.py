"""What a cascade of drafters cannot do is refused before any work, in one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding.helpers import generate, pair_of, prompts_for

from deferral_train.decoding.drafting import BigramTable, DraftCascade, MaxGram, Plan
from deferral_train.decoding.stopping import ConfidenceStop
from deferral_train.errors import InputError

TAIL, ALONE, VERTICAL = [[2, 3], [0, 0]], [[5]], [[2, 0], [0, 3]]


def refusal(k: list[list[int]], rule: Any = "lossless", plan: Any = None, **options: Any) -> str:
    drafter, verifier, _ = pair_of("llama")
    drafters = [drafter][: len(k) - 1]
    cascade = DraftCascade(drafters, Plan(k, **(plan or {})), "tokenizer")
    with pytest.raises(InputError) as error:
        generate(cascade, verifier, prompts_for("llama", rows=1), rule, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("rule", ["opt", "chow", "token_v1", "ensemble", "bild"])
@pytest.mark.parametrize("k", [TAIL, ALONE])
def test_confidence_of_max_gram_is_refused(k: list[list[int]], rule: str) -> None:
    assert "Max-Gram, which has none" in refusal(k, rule)


@pytest.mark.parametrize("rule", ["opt_verifier", "token_v3", "lenient", "lossless"])
def test_rules_that_need_no_confidence_take_max_gram(rule: str) -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 5, 6], [9, 9, 9, 9, 9]])}  # there is something to copy
    for cascade in (DraftCascade([drafter], Plan(TAIL)), DraftCascade([], Plan(ALONE))):
        for options in ({}, {"do_sample": True, "top_k": 5, "generator": torch.Generator().manual_seed(1)}):
            result = generate(cascade, verifier, inputs, rule, max_new_tokens=8, **options)
            assert int(result.stats.drafted.min()) > 0


def test_what_needs_one_drafter_is_refused() -> None:
    assert "execution='token' needs one model" in refusal(VERTICAL, "chow", execution="token")
    assert "stop shortens one drafter's blocks" in refusal(VERTICAL, stop=ConfidenceStop(0.5))
    assert "bonus 'exact' needs a drafter's distribution" in refusal(ALONE, bonus="exact")


def test_bigrams_of_another_tokenizer_are_refused() -> None:
    table = torch.full((40,), -1)
    foreign = MaxGram(bigrams=BigramTable(table, "another"))
    assert "learn it again with this tokenizer" in refusal(VERTICAL, plan={"max_gram": foreign})
    shorter = MaxGram(bigrams=BigramTable(table[:30], "tokenizer"))
    assert "30 ids, the models 40" in refusal(VERTICAL, plan={"max_gram": shorter})


def test_a_drafter_of_another_kind_is_refused() -> None:
    verifier = pair_of("llama")[1]
    cascade = DraftCascade([pair_of("t5")[0]], Plan(VERTICAL))
    with pytest.raises(InputError, match="one is encoder-decoder"):
        generate(cascade, verifier, prompts_for("llama", rows=1), "lossless")
