"""The study's tree of shared prefixes writes what decoding writes, and its scores are sacrebleu's."""

from __future__ import annotations

import numpy as np
import pytest
from decoding.helpers import pair_of

from benchmarks.greedy_tree import decode_tree
from benchmarks.sequence_labels import SCORES, against, counts_of, fewest_calls
from deferral_train.decoding import Pair
from deferral_train.decoding.pair import Settings
from deferral_train.evaluation.outputs import log_likelihoods
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import make_rule

RULES = {
    "lossless": make_rule("lossless"),
    "opt": make_rule("opt", alpha=0.05),
    "token_v2": make_rule("token_v2", alpha=0.1),
    "drafter_only": make_rule("opt", alpha=1.0),
    "lossy": make_rule("lossy", alpha=0.5),
}


@pytest.fixture(scope="module", params=["t5", "llama"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(make_pair(*pair_of(request.param)))


def nats(pair: Pair, prompt: Prompt, tokens: list[int]) -> float:
    """Log-likelihood of a text under the verifier, by the code that scores decoded outputs."""
    ids = pair.encode([prompt], Settings(max_new_tokens=len(tokens)))[0].input_ids
    return log_likelihoods(pair.models.verifier, [ids], [tokens], pair.models.vocab_size)[0]


@pytest.mark.parametrize("most", [6, 15])
def test_texts_and_calls_are_those_of_decoding(pair: Pair, most: int) -> None:
    numbers = [np.random.default_rng(n).integers(0, 30, 2 + n % 5) for n in range(12)]
    prompts = [Prompt(f"p{n}", " ".join(f"w{k}" for k in row), "w1") for n, row in enumerate(numbers)]
    found = {(row.rule, row.id): row for row in decode_tree(pair, prompts, RULES, 3, most)}
    for label, rule in RULES.items():
        own = pair.generate(prompts, rule=rule, num_draft_tokens=3, max_new_tokens=most, batch_size=12)
        for n, prompt in enumerate(prompts):
            row = found[label, prompt.id]
            assert row.tokens == own.sequences[n], label
            assert row.calls == int(own.stats.verifier_calls[n]), label
            assert row.log_likelihood == pytest.approx(nats(pair, prompt, row.tokens), rel=1e-4), label


def test_scores_of_summed_counts_are_sacrebleus() -> None:
    from sacrebleu.metrics import BLEU, CHRF, TER

    texts = ["a dog runs on the green grass", "two men are talking", "a woman reads a small book in the park"]
    references = [
        "a dog is running on green grass",
        "two men talk to each other",
        "a woman reads a book in the park",
    ]
    counts = {"verifier_calls": 1, "emitted": 2}
    rows = [
        {"id": n, "text": text, "reference": reference, "counts": counts}
        for n, (text, reference) in enumerate(zip(texts, references))
    ]
    found = counts_of(rows, {})
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF()), ("ter", TER())):
        value = SCORES[name](getattr(found, name).sum(0, keepdims=True))[0]
        assert value == pytest.approx(metric.corpus_score(texts, [references]).score, rel=1e-9)


def test_fewest_calls_and_differences_by_hand() -> None:
    """Two settings and lossless; in the second redraw the cheaper setting is within 0.2 already."""
    lossless = {"calls": np.array([0.5, 0.5]), "bleu": np.array([40.0, 40.0])}
    cheap = {"calls": np.array([0.25, 0.25]), "bleu": np.array([39.0, 39.9])}
    dear = {"calls": np.array([0.4, 0.4]), "bleu": np.array([39.8, 39.9])}
    found = fewest_calls([dear, cheap], lossless)
    assert found == pytest.approx({"calls": 0.8, "low": 0.5, "high": 0.5}, abs=2e-3)
    found = against(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0]))
    assert found == pytest.approx({"difference": 2.0, "low": 0.025, "high": 0.975})
