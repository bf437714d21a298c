"""Processors and criteria of the caller's own see text that rows have, as in ``generate``, and no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding.small import LEFT, ONE, TWO, cascade, llama, near, own
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from deferral_train.decoding.drafting import DraftCascade, GivenDraft, MaxGram, Plan
from deferral_train.errors import InputError
from deferral_train.rules import make_rule

BEGIN = 7
EXECUTIONS = ("speculative", "token", "lazy", "sequence")


def words_of(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(5, 9) for _ in range(draw.randint(2, 8))] + [1] for _ in range(30)]


def following(words: list[list[int]], text: list[int]) -> list[int]:
    """Tokens that a trie of ``words`` allows; padding behind an end.

    Raises:
        KeyError: no word begins so.
    """
    if 1 in text:
        if text[text.index(1) :] != [1, *[0] * (len(text) - text.index(1) - 1)]:
            raise KeyError(text)
        return [0, 1]
    found = sorted({word[len(text)] for word in words if word[: len(text)] == text})
    if not found:
        raise KeyError(text)
    return found


class Trie(LogitsProcessor):
    """Each row has words of its own; text outside of them is an error, as it is in grammars and automata."""

    def __init__(self, rows: int) -> None:
        self.words = [words_of(2 + row) for row in range(rows)]
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(input_ids[:, BEGIN:].tolist()):
            allowed = following(self.words[row], text)
            masked[row, allowed] = scores[row, allowed]
            self.seen.add((row, *text))
        return masked


def by_function(rows: int) -> dict[str, Any]:
    words = [words_of(2 + row) for row in range(rows)]
    return {"prefix_allowed_tokens_fn": lambda row, ids: following(words[row], ids[BEGIN:].tolist())}


def by_processor(rows: int) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Trie(rows)])}


FOUR = {"input_ids": torch.cat([TWO["input_ids"], TWO["input_ids"].flip(1)])}


@pytest.mark.parametrize("inputs", [ONE, TWO, FOUR], ids=["one", "two", "four"])
@pytest.mark.parametrize("constraint", [by_function, by_processor])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_every_prefix_is_a_row_s_own(
    inputs: dict[str, torch.Tensor], constraint: Callable[[int], dict[str, Any]], execution: str
) -> None:
    verifier, rows = llama(), len(inputs["input_ids"])
    expected = own(verifier, inputs, **constraint(rows))
    rule = make_rule("lossless") if execution == "speculative" else make_rule("chow", alpha=0.0)
    for drafter in (llama(1), near(verifier)):
        found = cascade(verifier, inputs, drafter, rule=rule, execution=execution, **constraint(rows))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("inputs", [ONE, FOUR], ids=["one", "four"])
def test_copies_and_given_texts_that_the_constraint_forbids(inputs: dict[str, torch.Tensor]) -> None:
    """Nothing constrains what Max-Gram or a given text proposes."""
    verifier, rows = llama(), len(inputs["input_ids"])
    expected = own(verifier, inputs, **by_processor(rows))
    for drafter in (
        DraftCascade([], Plan([[5]], max_gram=MaxGram("latest"))),
        GivenDraft([[8, 9, 30, 12, 5]] * rows),
        GivenDraft([[30, 12]] * rows),
    ):
        assert torch.equal(cascade(verifier, inputs, drafter, **by_processor(rows)), expected)


def test_a_cascade_of_drafters_under_a_constraint() -> None:
    verifier = llama()
    drafter = DraftCascade([near(verifier), llama(1)], Plan([[3, 2, 0], [0, 2, 0], [0, 0, 4]]))
    assert torch.equal(
        cascade(verifier, ONE, drafter, **by_processor(1)), own(verifier, ONE, **by_processor(1))
    )
    with pytest.raises(
        InputError, match=r"batch of 2 with a cascade of drafters: .* decode one row at a time"
    ):
        cascade(verifier, TWO, drafter, **by_processor(2))


def test_the_sampled_distribution_is_unchanged_when_rows_advance_together() -> None:
    """Frequencies of the second token, of four rows that are cut to the shortest acceptance among them."""
    verifier = llama()
    drafter = near(verifier, 0.1)

    class Known(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, torch.arange(4, 34), -torch.inf)

    options: dict[str, Any] = {
        "logits_processor": LogitsProcessorList([Known()]), "do_sample": True, "top_k": 0, "max_new_tokens": 3,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    prompts = {"input_ids": ONE["input_ids"].expand(400, -1)}
    counts = []
    for run in (
        lambda: own(verifier, prompts, **options),
        lambda: cascade(verifier, prompts, drafter, **options),
    ):
        torch.manual_seed(3)
        found = torch.zeros(40)
        for _ in range(10):
            found += torch.bincount(run()[:, BEGIN + 1], minlength=40)
        counts.append(found)
    used = (counts[0] + counts[1]) > 0
    statistic = ((counts[0] - counts[1])[used] ** 2 / (counts[0] + counts[1])[used]).sum()
    from scipy.stats import chi2

    assert chi2.sf(float(statistic), int(used.sum()) - 1) > 1e-5  # fails by chance once in 100,000 seeds


class Known(StoppingCriteria):
    """Ends a row at a word's end, and refuses text that no row has."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = input_ids[:, BEGIN:].tolist()
        for row, text in enumerate(rows):
            stopped = 5 if len(text) >= 5 and text[4] % 2 == 0 else len(text)
            if text[:stopped] != self.texts[row][:stopped] or any(text[stopped:]):
                raise ValueError(f"row {row} never was {text}")
        return torch.tensor([len(text) >= 5 and text[4] % 2 == 0 for text in rows])


def test_criteria_see_rows_as_generate_shows_them() -> None:
    verifier = llama()
    texts = own(verifier, FOUR)[:, BEGIN:].tolist()
    for drafter in (llama(1), near(verifier), verifier):
        found = cascade(verifier, FOUR, drafter, stopping_criteria=StoppingCriteriaList([Known(texts)]))
        for row, text in enumerate(found[:, BEGIN:].tolist()):
            stops = texts[row][4] % 2 == 0
            expected = texts[row][:5] if stops else texts[row]
            assert text[: len(expected)] == expected
            assert set(text[len(expected) :]) <= {0}


class Counts(LogitsProcessor):
    """Bans a token by how often it was asked, or by the length of the text: the same where nothing is drafted."""

    def __init__(self, counts: bool) -> None:
        self.counts, self.calls, self.start = counts, 0, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        place = self.calls if self.counts else input_ids.shape[1] - self.start
        self.calls += self.counts
        return scores.index_fill(1, torch.tensor([4 + (7 * place) % 36, 4 + (11 * place) % 36]), -torch.inf)


@pytest.mark.parametrize("inputs", [ONE, LEFT], ids=["one", "ragged"])
def test_a_processor_that_counts_its_calls_is_refused_and_one_that_reads_the_text_is_not(
    inputs: dict[str, torch.Tensor],
) -> None:
    verifier = llama()
    expected = own(verifier, inputs, logits_processor=LogitsProcessorList([Counts(True)]))
    assert torch.equal(own(verifier, inputs, logits_processor=LogitsProcessorList([Counts(False)])), expected)
    found = cascade(verifier, inputs, near(verifier), logits_processor=LogitsProcessorList([Counts(False)]))
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="logits processor Counts: its calls changes from call to call"):
        cascade(verifier, inputs, near(verifier), logits_processor=LogitsProcessorList([Counts(True)]))
