"""The distribution of the whole cascade when sampling: enumerated exactly on tables, and sampled from tiny models.

The naive distribution (a reviewed token was drawn from its reviewer's own distribution) must fail both.
"""

from __future__ import annotations

import random
from functools import cache, lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from decoding.helpers import generate
from decoding.test_distribution import SIZE, assert_distribution, index_of, models
from drafting.enumeration import Distribution, Enumeration, exact_distribution
from drafting.test_suffixes import longest_match
from tiny_models import tiny_model

from deferral_train.decoding import cascade_drafting
from deferral_train.decoding.drafting import DraftCascade, MaxGram, Plan
from deferral_train.rules import make_rule

PROMPT = (1, 2, 1, 2, 1)  # repeats, so that Max-Gram has something to say from the start
MATRICES = {
    "plain": [[2, 0], [0, 0]],
    "max_gram": [[3]],
    "vertical": [[2, 0], [0, 2]],
    "tail": [[1, 2], [0, 1]],
    "three_levels": [[2, 0, 0], [0, 1, 0], [0, 0, 2]],
    "all": [[1, 1, 1], [0, 1, 1], [0, 0, 1]],
}


@cache
def table(model: int, prefix: tuple[int, ...]) -> Distribution:
    """The distribution of a tabular model after a prefix: fixed random numbers, some of them 0."""
    numbers = random.Random(f"{model} {prefix}")
    weights = [numbers.choice([0, 1, 2, 4, 9]) for _ in range(SIZE)]
    weights[numbers.randrange(SIZE)] += 1
    return [weight / sum(weights) for weight in weights]


def copied(prefix: tuple[int, ...], count: int) -> list[int]:
    """Max-Gram in the plainest way."""
    match, text = longest_match(prefix), list(prefix)
    if match.length:
        for step in range(count):
            text.append(text[match.end + 1 + step])
    return text[len(prefix) :]


def worst_error(k: list[list[int]], lenience: float, naive: bool) -> float:
    """Largest deviation from the verifier's distribution of the first token, and of the second after each first."""
    drafters = [lambda prefix, m=m: table(m, prefix) for m in range(len(k))]
    rounds = Enumeration(drafters, copied, k, lenience, naive).round((0, 1, 0), cap=4)
    assert sum(chance for chance, _, _ in rounds) == pytest.approx(1.0)
    worst = 0.0
    for first in [(), *((token,) for token in range(SIZE))]:
        distribution = [0.0] * SIZE
        for chance, tokens, _ in rounds:
            if tokens[: len(first)] == first and len(tokens) > len(first):
                distribution[tokens[len(first)]] += chance
        if sum(distribution) > 0:
            wanted = table(0, (0, 1, 0, *first))
            worst = max(worst, *(abs(a / sum(distribution) - b) for a, b in zip(distribution, wanted)))
    return worst


@pytest.mark.parametrize("lenience", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", list(MATRICES))
def test_the_verifier_emits_its_own_distribution(name: str, lenience: float) -> None:
    assert worst_error(MATRICES[name], lenience, naive=False) < 1e-12


@pytest.mark.parametrize("name", ["vertical", "three_levels", "all"])
def test_the_naive_distribution_would_bias_it(name: str) -> None:
    assert worst_error(MATRICES[name], 1.0, naive=True) < 1e-12  # without lenience it is right
    assert worst_error(MATRICES[name], 2.0, naive=True) > 0.01
    assert worst_error(MATRICES[name], 5.0, naive=True) > 0.01


@lru_cache(maxsize=1)
def small() -> Any:
    """A second drafter beside those of ``decoding.test_distribution``."""
    model = tiny_model("llama", 5, vocab_size=40)
    model.resize_token_embeddings(SIZE)
    model.config.pad_token_id = model.config.eos_token_id = None
    return model


def sample(name: str, lenience: float, rule: Any, rows: int, steps: int = 3, **options: Any) -> torch.Tensor:
    """Continuations [rows, steps]."""
    drafter, verifier = models()
    k = MATRICES[name]
    cascade = DraftCascade([drafter, small()][: len(k) - 1], Plan(k, lenience))
    ids = torch.tensor([PROMPT]).repeat(rows, 1)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": steps, **options}
    generator = torch.Generator().manual_seed(17)
    output = generate(cascade, verifier, {"input_ids": ids}, rule, generator=generator, **settings)
    return output.sequences[:, len(PROMPT) :]


def assert_verifiers_distribution(sequences: torch.Tensor) -> None:
    steps, verifier = sequences.shape[1], models()[1]
    places = torch.tensor([index_of(tuple(row)) for row in sequences.tolist()])
    distribution = torch.ones(SIZE**steps, dtype=torch.float64)
    for sequence in product(range(SIZE), repeat=steps):
        logits = verifier(input_ids=torch.tensor([[*PROMPT, *sequence]])).logits[0, len(PROMPT) - 1 : -1]
        distribution[index_of(sequence)] = (
            torch.softmax(logits.double(), -1).gather(1, torch.tensor([sequence]).T).prod()
        )
    assert_distribution(torch.bincount(places, minlength=SIZE**steps), distribution)


@pytest.mark.parametrize("lenience", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", ["vertical", "all"])
def test_samples_follow_the_verifier(name: str, lenience: float) -> None:
    assert_verifiers_distribution(sample(name, lenience, "lossless", rows=1000))


@pytest.mark.parametrize("name", ["max_gram", "tail", "three_levels"])
def test_samples_of_the_others_follow_it_too(name: str) -> None:
    assert_verifiers_distribution(sample(name, 2.0, "lossless", rows=1000))


@pytest.mark.parametrize("lenience", [2.0, 5.0])
def test_samples_with_the_naive_distribution_do_not(monkeypatch: pytest.MonkeyPatch, lenience: float) -> None:
    monkeypatch.setattr(
        cascade_drafting, "reviewed_distribution", lambda proposal, reviewer, lenience: reviewer
    )
    with pytest.raises(AssertionError):
        assert_verifiers_distribution(sample("vertical", lenience, "lossless", rows=1000))


@pytest.mark.parametrize("name", ["opt", "token_v3", "lenient", "ensemble", "drafter_only"])
def test_other_rules_take_the_distribution_that_tokens_were_drawn_from(name: str) -> None:
    """The first token follows pi of q~ and p, decided by the reviewing drafter's own distribution."""
    rule, lenience = make_rule(name), 3.0
    drafter, verifier = (model(input_ids=torch.tensor([PROMPT])).logits[0, -1] for model in models())
    one_hot = [1.0 if token == 2 else 0.0 for token in range(SIZE)]  # what Max-Gram copies
    distribution = exact_distribution(one_hot, torch.softmax(drafter.double(), -1).tolist(), lenience)
    pi = rule.target(drafter, verifier, drafter_sampling_logits=torch.tensor(distribution).log())
    plan = Plan(MATRICES["vertical"], lenience, MaxGram())
    ids = torch.tensor([PROMPT]).repeat(1500, 1)
    output = generate(
        DraftCascade([models()[0]], plan), models()[1], {"input_ids": ids}, rule, do_sample=True, top_k=0,
        max_new_tokens=3, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert_distribution(torch.bincount(output.sequences[:, len(PROMPT)], minlength=SIZE), pi)
