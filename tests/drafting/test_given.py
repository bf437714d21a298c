"""A given text as the draft: exact where the rule is, biased as published, and what streaming shows of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of
from hypothesis import given
from hypothesis import strategies as st

from deferral_train.decoding.drafting import GivenDraft
from deferral_train.decoding.drafting.given import displayed, erased, normalised_erasure
from deferral_train.errors import InputError
from deferral_train.rules import make_rule

TOKENS = 16


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_lossless_text_is_the_verifiers_own_whatever_is_given(kind: str) -> None:
    inputs, verifier = prompts_for(kind), pair_of(kind)[1]
    plain = generate(pair_of(kind)[0], verifier, inputs, "lossless", max_new_tokens=TOKENS)
    own = [emitted(plain, row) for row in range(4)]
    texts = [own[0], [*own[1][:5], 7, 7, 7], [], [9] * 30]
    result = generate(GivenDraft(texts), verifier, inputs, "lossless", max_new_tokens=TOKENS)
    assert torch.equal(result.sequences, plain.sequences)
    calls = result.stats.verifier_calls.tolist()
    assert calls[0] == 1  # the whole text in one pass, up to the limit
    assert calls[1] <= TOKENS - 5
    assert result.stats.drafter_passes == 0


def reference(verifier: Any, prompt: torch.Tensor, draft: list[int], bias: float, new: int) -> list[int]:
    """As published, token by token: argmax of (1 - b) P + b 1[draft] until that is not the draft, then argmax P."""
    ids, along = prompt.clone(), True
    for place in range(new):
        distribution = torch.softmax(verifier(input_ids=ids).logits[0, -1].double(), dim=-1)
        if along and place < len(draft):
            distribution = (1 - bias) * distribution
            distribution[draft[place]] += bias
        else:
            along = False
        token = int(distribution.argmax())
        along = along and token == draft[place]
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == 1:
            break
    return ids[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("bias", [0.1, 0.3, 0.45])
def test_biased_output_is_the_published_one(bias: float) -> None:
    verifier = pair_of("llama")[1]
    other = prompts_for("llama", rows=4, seed=5)
    stood = 0
    for row in range(4):
        prompt = row_of("llama", other, row)["input_ids"]
        own = reference(verifier, prompt, [], 0.0, 10)
        runner_up = verifier(input_ids=prompt).logits[0, -1].topk(2).indices[1]
        for draft in ([*own[:4], 8, 9], [int(runner_up), *own], own):
            rule = make_rule("biased", bias=bias)
            for new in (12, len(draft), 3):  # the limit may end the text within the draft
                wanted = reference(verifier, prompt, draft, bias, new)
                found = generate(
                    GivenDraft([draft]), verifier, {"input_ids": prompt}, rule, max_new_tokens=new
                )
                assert emitted(found, 0) == wanted
            wanted = reference(verifier, prompt, draft, bias, 12)
            stood += wanted[:10] != own
    assert stood > 0 or bias < 0.3  # the bias did change a text


def test_what_a_given_text_cannot_do_is_refused() -> None:
    inputs, verifier = prompts_for("llama", rows=2), pair_of("llama")[1]
    for texts, rule, options, words in (
        ([[5]], "lossless", {}, "1 given texts for 2 rows"),
        ([[5], [40]], "lossless", {}, "given text 1 holds ids outside"),
        ([[5], [6]], "opt", {}, "given text has none"),
        ([[5], [6]], "lossless", {"bonus": "exact"}, "given text has none"),
        ([[5], [6]], "chow", {"execution": "lazy"}, "needs one model"),
    ):
        with pytest.raises(InputError, match=words):
            generate(GivenDraft(texts), verifier, inputs, rule, **options)


TEXT = st.lists(st.integers(0, 2), max_size=6)


@given(st.lists(TEXT, max_size=5))
def test_erasure_counts_what_a_reader_sees_replaced(shown: list[list[int]]) -> None:
    total = 0
    for before, after in pairwise(shown):
        keeps = max(size for size in range(len(before) + 1) if before[:size] == after[:size])
        assert erased(before, after) == len(before) - keeps
        total += len(before) - keeps
    wanted = total / len(shown[-1]) if shown and shown[-1] else 0.0
    assert normalised_erasure(shown) == pytest.approx(wanted)


def test_the_display_hides_the_last_tokens_until_the_end() -> None:
    assert displayed([1, 2, 3], 2, final=False) == [1]
    assert displayed([1, 2, 3], 5, final=False) == []
    assert displayed([1, 2, 3], 0, final=False) == displayed([1, 2, 3], 2, final=True) == [1, 2, 3]
