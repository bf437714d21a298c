"""Greedy lossless decoding through any cascade of drafters gives the verifier's own text, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of

from deferral_train.decoding.drafting import BigramTable, DraftCascade, MaxGram, Plan
from deferral_train.rules import make_rule

# K and the number of drafters: Max-Gram alone, plain, vertical, horizontal, both, three levels and all of it.
CASCADES = {
    "max_gram": ([[5]], 0),
    "plain": ([[4, 0], [0, 0]], 1),
    "vertical": ([[4, 0], [0, 5]], 1),
    "horizontal": ([[2, 2, 0], [0, 0, 0], [0, 0, 0]], 2),
    "max_gram_tail": ([[2, 6], [0, 0]], 1),
    "three_levels": ([[3, 0, 0], [0, 2, 0], [0, 0, 5]], 2),
    "all": ([[3, 5, 2], [0, 1, 3], [0, 0, 5]], 2),
}
TOKENS = 14


def cascade(kind: str, name: str, **options: Any) -> DraftCascade:
    """Drafters that are right now and then, and hardly ever."""
    k, count = CASCADES[name]
    drafters = [pair_of(kind, how)[0] for how in ("sometimes", "never")][:count]
    return DraftCascade(drafters, Plan(k, **options))


def expected(kind: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return pair_of(kind)[1].generate(**inputs, max_new_tokens=TOKENS, do_sample=False)


@pytest.mark.parametrize("name", list(CASCADES))
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_text_is_the_verifiers_own(kind: str, name: str) -> None:
    inputs = prompts_for(kind, rows=4)
    wanted, verifier = expected(kind, inputs), pair_of(kind)[1]
    for lenience, match in ((1.0, "earliest"), (3.0, "latest")):
        drafter = cascade(kind, name, lenience=lenience, max_gram=MaxGram(match))
        result = generate(drafter, verifier, inputs, "lossless", max_new_tokens=TOKENS)
        assert torch.equal(result.sequences, wanted)
        stats = result.stats
        parts = stats.kept + stats.accepted + stats.rejected + stats.discarded
        assert torch.equal(stats.drafted, parts)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mistral"])
def test_other_caches_roll_back(kind: str) -> None:
    inputs = prompts_for(kind, rows=4)
    drafter = cascade(kind, "all", lenience=2.0)
    result = generate(drafter, pair_of(kind)[1], inputs, "lossless", max_new_tokens=TOKENS)
    assert torch.equal(result.sequences, expected(kind, inputs))


@pytest.mark.parametrize("rule", ["opt", "token_v3", "chow", "biased", "verifier_only", "drafter_only"])
@pytest.mark.parametrize("name", ["vertical", "three_levels"])
def test_a_row_does_not_depend_on_its_neighbours_under_any_rule(name: str, rule: str) -> None:
    inputs, verifier = prompts_for("llama"), pair_of("llama")[1]
    drafter = cascade("llama", name, lenience=2.0)
    together = generate(drafter, verifier, inputs, rule, max_new_tokens=12)
    for row in (0, 3):
        alone = generate(drafter, verifier, row_of("llama", inputs, row), rule, max_new_tokens=12)
        assert emitted(alone, 0) == emitted(together, row)
        assert alone.stats.row(0) == together.stats.row(row)


def test_one_drafter_that_writes_alone_is_the_plain_drafter() -> None:
    inputs, (drafter, verifier, _) = prompts_for("llama"), pair_of("llama")
    plain = generate(drafter, verifier, inputs, "opt", num_draft_tokens=4, max_new_tokens=TOKENS)
    cascaded = generate(cascade("llama", "plain"), verifier, inputs, "opt", max_new_tokens=TOKENS)
    assert torch.equal(plain.sequences, cascaded.sequences)
    assert torch.equal(plain.stats.origin, cascaded.stats.origin)
    assert torch.equal(plain.stats.counts["drafter_calls"], cascaded.stats.counts["drafter_calls"])


def test_a_copy_costs_few_passes_and_calls_are_counted() -> None:
    """A drafter that is always right, and a prompt that says it all before: one pass reviews many tokens."""
    drafter, verifier, _ = pair_of("llama", "always")
    prompt = torch.tensor([[5, 6, 7, 8]])
    text = verifier.generate(input_ids=prompt, max_new_tokens=TOKENS, do_sample=False)
    inputs = {"input_ids": torch.cat([text, text[:, :6]], dim=1)}
    wanted = verifier.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    counts = {}
    for name in ("plain", "vertical"):
        k, _ = CASCADES[name]
        result = generate(
            DraftCascade([drafter], Plan(k)), verifier, inputs, "lossless", max_new_tokens=TOKENS
        )
        assert torch.equal(result.sequences, wanted)
        counts[name] = result.stats
    assert int(counts["plain"].drafter_calls) == counts["plain"].drafter_passes
    assert int(counts["vertical"].drafter_calls) == counts["vertical"].drafter_passes
    assert int(counts["vertical"].drafter_calls) < int(counts["plain"].drafter_calls)


def test_bigrams_fill_up_where_nothing_matches() -> None:
    inputs, verifier = prompts_for("llama", rows=1), pair_of("llama")[1]
    wanted = expected("llama", inputs)
    table = BigramTable.learn(wanted.tolist(), 40, "t")
    drafter = DraftCascade([], Plan([[5]], max_gram=MaxGram(bigrams=table)), "t")
    filled = generate(drafter, verifier, inputs, "lossless", max_new_tokens=TOKENS)
    without = generate(cascade("llama", "max_gram"), verifier, inputs, "lossless", max_new_tokens=TOKENS)
    assert torch.equal(filled.sequences, wanted)
    assert torch.equal(without.sequences, wanted)
    assert int(filled.stats.drafted) > int(without.stats.drafted)


def test_hidden_states_are_those_of_the_reviewing_drafter() -> None:
    """A rule that reads them decides as with the plain drafter, token for token."""

    class Head:
        stage, features = "verify", ("drafter_hidden", "verifier_max", "verifier_at_drafter_argmax")

        def gap(self, summary: Any) -> torch.Tensor:
            return summary["drafter_hidden"].mean(dim=-1)

    rule = make_rule("learned", head=Head(), alpha=0.0)
    inputs, (drafter, verifier, _) = prompts_for("llama"), pair_of("llama")
    plain = generate(drafter, verifier, inputs, rule, num_draft_tokens=4, max_new_tokens=TOKENS)
    cascaded = generate(cascade("llama", "plain"), verifier, inputs, rule, max_new_tokens=TOKENS)
    assert torch.equal(plain.stats.origin, cascaded.stats.origin)
    assert 0 < int(plain.stats.kept.sum()) < int(plain.stats.drafted.sum())
