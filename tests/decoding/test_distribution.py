"""The distribution of the whole loop when sampling, against exact enumeration over a vocabulary of three tokens.

Two tiny Llama models have distributions that can be written down for every prefix. A chi-square test compares
thousands of sampled rows with them; each comparison has a stated probability FAILURE of failing by chance, and
fixed seeds make the outcome the same every time.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from decoding.helpers import generate
from rules.instances import TABLE, TokenCost
from scipy import stats
from tiny_models import tiny_model

from deferral_train.rules import RULES, BlockRule, Origin, Rule, make_rule

SIZE, STEPS, ROWS = 3, 3, 1500
FAILURE = 1e-6
PROMPT = (1, 2)
TARGETED = [name for name, rule in RULES.items() if not issubclass(rule, BlockRule)]


class ToyHead:
    """A head with a formula for weights."""

    stage = "verify"

    def __init__(self, features: tuple[str, ...]) -> None:
        self.features = features

    def gap(self, summary: Any) -> torch.Tensor:
        return summary["verifier_max"] - summary["verifier_at_drafter_argmax"]

    def score(self, summary: Any) -> torch.Tensor:
        return summary["verifier_logprob"].exp()


def rule_named(name: str) -> Rule:
    if name == "learned":
        return make_rule(name, head=ToyHead(("verifier_max", "verifier_at_drafter_argmax")), alpha=0.1)
    if name == "judge":
        return make_rule(name, head=ToyHead(("verifier_logprob",)), threshold=0.3)
    if name == "token_gap":
        return make_rule(name, head=TokenCost(), alpha=0.1)
    if name == "csd":
        return make_rule(name, table=TABLE)
    return make_rule(name)


@lru_cache(maxsize=1)
def models() -> tuple[Any, Any]:
    """(drafter, verifier) over three tokens, none of which ends a text."""
    made = []
    for seed in (1, 2):
        model = tiny_model("llama", seed, vocab_size=40)
        model.resize_token_embeddings(SIZE)
        model.config.pad_token_id = model.config.eos_token_id = None
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        model.lm_head.weight.mul_(0.7)
        made.append(model)
    return made[0], made[1]


@lru_cache(maxsize=1)
def logits() -> dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]:
    """Drafter and verifier logits after the prompt and every continuation shorter than STEPS."""
    found = {}
    for length in range(STEPS):
        for prefix in product(range(SIZE), repeat=length):
            ids = torch.tensor([[*PROMPT, *prefix]])
            found[prefix] = tuple(model(input_ids=ids).logits[0, -1] for model in models())
    return found  # type: ignore[return-value]


def target(rule: Rule, prefix: tuple[int, ...]) -> torch.Tensor:
    drafter, verifier = logits()[prefix]
    return rule.target(drafter[None], verifier[None])[0]


def verifier_distribution(prefix: tuple[int, ...]) -> torch.Tensor:
    return torch.softmax(logits()[prefix][1], dim=-1)


def sample(
    rule: Rule, seed: int, rows: int = ROWS, **options: Any
) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Continuations and the origins of their tokens."""
    drafter, verifier = models()
    ids = torch.tensor([PROMPT]).repeat(rows, 1)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": STEPS, "num_draft_tokens": 2, **options}
    generator = torch.Generator().manual_seed(seed)
    output = generate(drafter, verifier, {"input_ids": ids}, rule, generator=generator, **settings)
    return [tuple(row) for row in output.sequences[:, len(PROMPT) :].tolist()], output.stats.origin.tolist()


def assert_distribution(counts: torch.Tensor, distribution: torch.Tensor) -> None:
    """Chi-square; outcomes of probability 0 must not occur, rare ones are pooled."""
    expected = distribution.double() / distribution.double().sum() * counts.sum()
    assert int(counts[expected == 0].sum()) == 0
    cells = sorted(zip(expected.tolist(), counts.tolist()))
    while len(cells) > 1 and cells[0][0] < 5:
        (first, seen), (second, also) = cells[:2]
        cells = sorted([(first + second, seen + also), *cells[2:]])
    if len(cells) > 1:
        wanted, observed = zip(*cells)
        assert stats.chisquare(observed, wanted).pvalue > FAILURE


def index_of(sequence: tuple[int, ...]) -> int:
    place = 0
    for token in sequence:
        place = place * SIZE + token
    return place


@pytest.mark.parametrize("name", TARGETED)
def test_exact_bonus_gives_the_autoregressive_target_distribution(name: str) -> None:
    rule = rule_named(name)
    sequences, _ = sample(rule, seed=7, bonus="exact")
    counts = torch.bincount(torch.tensor([index_of(s) for s in sequences]), minlength=SIZE**STEPS)
    distribution = torch.zeros(SIZE**STEPS, dtype=torch.float64)
    for sequence in product(range(SIZE), repeat=STEPS):
        chance = 1.0
        for step, token in enumerate(sequence):
            chance *= float(target(rule, sequence[:step])[token])
        distribution[index_of(sequence)] = chance
    assert_distribution(counts, distribution)


@pytest.mark.parametrize("name", TARGETED)
def test_verifier_bonus_follows_the_verifier_and_drafts_follow_the_target(name: str) -> None:
    rule = rule_named(name)
    sequences, origins = sample(rule, seed=8, num_draft_tokens=1)
    groups: dict[tuple[tuple[int, ...], bool], torch.Tensor] = {}
    for sequence, origin in zip(sequences, origins):
        for step, token in enumerate(sequence):
            group = groups.setdefault((sequence[:step], origin[step] == Origin.BONUS), torch.zeros(SIZE))
            group[token] += 1
    assert any(is_bonus for _, is_bonus in groups) or name == "drafter_only"
    for (prefix, is_bonus), counts in groups.items():
        assert_distribution(counts, verifier_distribution(prefix) if is_bonus else target(rule, prefix))


@pytest.mark.parametrize("name", ["lossless", "opt", "token_v3"])
def test_rows_that_wait_follow_the_same_distribution(name: str) -> None:
    rule = rule_named(name)
    sequences, _ = sample(rule, seed=9, rows=400, bonus="exact")
    counts = torch.bincount(torch.tensor([s[0] * SIZE + s[1] for s in sequences]), minlength=SIZE**2)
    distribution = torch.stack([target(rule, ())[t] * target(rule, (t,)) for t in range(SIZE)]).flatten()
    assert_distribution(counts, distribution)


@pytest.mark.parametrize("execution", ["token", "lazy"])
def test_executions_without_blocks_follow_the_target(execution: str) -> None:
    rule = make_rule("chow", alpha=0.5)
    sequences, _ = sample(rule, seed=10, execution=execution, bonus="exact")
    counts = torch.bincount(torch.tensor([s[0] * SIZE + s[1] for s in sequences]), minlength=SIZE**2)
    distribution = torch.stack([target(rule, ())[t] * target(rule, (t,)) for t in range(SIZE)]).flatten()
    assert_distribution(counts, distribution)


def test_the_test_would_notice_another_distribution() -> None:
    sequences, _ = sample(make_rule("opt", alpha=0.2), seed=7, bonus="exact")
    counts = torch.bincount(torch.tensor([s[0] for s in sequences]), minlength=SIZE)
    with pytest.raises(AssertionError):
        assert_distribution(counts, verifier_distribution(()).roll(1))
