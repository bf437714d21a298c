"""The synthetic language: P is what texts follow, models are estimates of it, the truth group is exact."""

import numpy as np
import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.pairs.synthetic import (
    SyntheticConfig,
    _estimate,
    build_language,
    chunks,
    sample_sequences,
)

SMALL = SyntheticConfig(vocab_size=8, verifier_tokens=40_000, drafter_tokens=4_000)


@pytest.fixture(scope="module")
def language():
    return build_language(SMALL)


def test_distributions_are_distributions_and_repeatable(language):
    again = build_language(SMALL)
    for role in ("truth", "verifier", "drafter"):
        table = getattr(language, role).table
        assert table.shape == (8 ** getattr(language, role).order, 8)
        assert (table > 0).all()
        torch.testing.assert_close(table.sum(-1), torch.ones(len(table)), atol=1e-5, rtol=0)
        assert torch.equal(table, getattr(again, role).table)


def test_texts_follow_the_truth(language):
    """Next-token counts against P: normalised squared deviations average 1, within 6 standard errors."""
    texts = sample_sequences(language, 400, 500, seed=1)
    counts = np.zeros((512, 8))
    index = (texts[:, :-3] * 64 + texts[:, 1:-2] * 8 + texts[:, 2:-1]).reshape(-1)
    np.add.at(counts, (index.numpy(), texts[:, 3:].reshape(-1).numpy()), 1)
    distribution = language.truth.table.numpy()
    expected = counts.sum(-1, keepdims=True) * distribution
    common = expected > 20
    assert common.sum() > 500
    squares = (counts - expected)[common] ** 2 / (expected * (1 - distribution))[common]
    assert abs(squares.mean() - 1) < 6 * squares.std() / np.sqrt(len(squares))


def test_estimate_against_a_plain_count():
    texts = np.array([[1, 2, 1, 2, 0]])
    table = _estimate(texts, order=1, size=3, smoothing=2.0)
    unigram = (np.array([1, 2, 2]) + 2.0 / 3) / 7
    after_1 = (np.array([0, 0, 2]) + 2.0 * unigram) / 4
    after_start = (np.array([0, 1, 0]) + 2.0 * unigram) / 3  # texts start after token 0
    np.testing.assert_allclose(table[1], after_1, rtol=1e-6)
    np.testing.assert_allclose(table[0], after_start, rtol=1e-6)


def test_context_indexing_matches_a_loop(language):
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    distribution = language.truth.distribution(tokens)
    padded = [0, 0, 3, 1, 4, 1, 5]
    for t in range(5):
        a, b, c = padded[t : t + 3]
        assert torch.equal(distribution[0, t], language.truth.table[a * 64 + b * 8 + c])


def test_chunks_cover_all_sequences_and_truth_is_exact(language):
    texts = sample_sequences(language, 10, 20, seed=2)
    seen = 0
    for chunk in chunks(language, texts, size=4, dtype=torch.float64):
        q, p, distribution = chunk.drafter_logits.softmax(-1), chunk.verifier_logits.softmax(-1), chunk.truth
        columns = chunk.truth_columns()
        v_q = q.argmax(-1, keepdim=True)
        torch.testing.assert_close(columns["truth_drafter_argmax"], distribution.gather(-1, v_q)[..., 0])
        torch.testing.assert_close(columns["truth_verifier_log"], -(distribution * p.log()).sum(-1))
        torch.testing.assert_close(columns["truth_drafter_prob"], (distribution * q).sum(-1))
        assert torch.equal(chunk.gold, texts[seen : seen + 4])
        # position t's distribution knows tokens before t only
        again = next(chunks(language, chunk.gold[:, :7], dtype=torch.float64))
        assert torch.equal(again.truth, distribution[:, :7])
        seen += len(chunk.gold)
    assert seen == 10


def test_doubled_drafter_is_the_same_drafter_sharper(language):
    doubled = build_language(SyntheticConfig(**{**SMALL.__dict__, "drafter_scale": 2.0}))
    texts = sample_sequences(language, 3, 30, seed=3)
    one, two = next(chunks(language, texts)), next(chunks(doubled, texts))
    torch.testing.assert_close(two.drafter_logits, 2 * one.drafter_logits)
    assert torch.equal(one.verifier_logits, two.verifier_logits)
    torch.testing.assert_close(doubled.drafter.distribution(texts), doubled.drafter.logits(texts).softmax(-1))


def test_default_language_has_a_better_verifier():
    """The published parameters: the verifier is nearer to P than the drafter, and neither is P."""
    language = build_language()
    texts = sample_sequences(language, 60, 100, seed=0)
    columns = next(chunks(language, texts, size=60)).truth_columns()
    distribution = language.truth.distribution(texts)
    entropy = -(distribution * distribution.clamp_min(1e-30).log()).sum(-1).mean()
    assert entropy + 0.05 < columns["truth_verifier_log"].mean() < columns["truth_drafter_log"].mean() - 0.2


@pytest.mark.parametrize(
    "bad", [{"vocab_size": 1}, {"vocab_size": 4096}, {"smoothing": 0.0}, {"drafter_tokens": 10}, {"order": 0}]
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(InputError, match="synthetic"):
        SyntheticConfig(**bad)
