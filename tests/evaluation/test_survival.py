"""The block chain against enumeration of every accept/reject history and against a simulated decoder."""

from functools import lru_cache

import numpy as np
import pytest

from deferral_train.evaluation.positions import PromptRows
from deferral_train.evaluation.speed import SpeedModel
from deferral_train.evaluation.survival import block_chain, expected_calls


def calls_by_recursion(acceptance: np.ndarray, block: int) -> float:
    """V(s) = 1 + sum_k P(k accepted from s) V(s + k + 1), straight from the definition."""

    @lru_cache(None)
    def calls(start: int) -> float:
        if start >= len(acceptance):
            return 0.0
        total, alive = 1.0, 1.0
        for k in range(block):
            here = acceptance[start + k] if start + k < len(acceptance) else 0.0
            total += alive * (1 - here) * calls(start + k + 1)
            alive *= here
        return total + alive * calls(start + block + 1)

    return calls(0)


@pytest.mark.parametrize("block", [1, 3, 5])
def test_calls_equal_the_definition_on_ragged_prompts(block: int) -> None:
    generator = np.random.default_rng(0)
    lengths = [7, 1, 12, 4]
    layout = PromptRows.of(np.repeat(np.arange(4), lengths))
    acceptance = generator.uniform(size=(sum(lengths), 3))
    deferral = np.clip(2 * (1 - acceptance), 0, 1)
    blocks = block_chain(acceptance, layout, block, deferral)
    np.testing.assert_allclose(expected_calls(acceptance, layout, block), blocks.calls)
    for setting in range(3):
        for prompt, (start, length) in enumerate(zip(layout.starts, layout.lengths)):
            own = acceptance[start : start + length, setting]
            assert blocks.calls[prompt, setting] == pytest.approx(calls_by_recursion(own, block))
    # Every position is either drafted and judged, or the bonus after a full block; each rejection opens a
    # block.
    assert (blocks.judged <= layout.lengths[:, None] + 1e-9).all()
    assert (blocks.rejected <= blocks.calls + 1e-9).all()
    assert (blocks.rejected <= blocks.deferred + 1e-9).all()


def test_constant_acceptance_gives_the_textbook_length_on_long_sequences() -> None:
    a, block, n = 0.8, 5, 3000
    blocks = block_chain(np.full((n, 1), a), PromptRows.of(np.zeros(n, dtype=int)), block)
    assert n / blocks.calls[0, 0] == pytest.approx((1 - a ** (block + 1)) / (1 - a), rel=3e-3)


def test_iid_formula_is_off_where_acceptance_varies() -> None:
    """The reason for this module: half the positions always accepted, half never, in long runs."""
    acceptance = np.tile(np.r_[np.ones(60), np.zeros(60)], 20)
    layout = PromptRows.of(np.zeros(len(acceptance), dtype=int))
    calls = expected_calls(acceptance[:, None], layout, 5)[0, 0]
    iid = (1 - 0.5**6) / 0.5
    assert len(acceptance) / calls == pytest.approx(2 / (1 + 1 / 6), rel=0.01)
    assert abs(iid - len(acceptance) / calls) > 0.2


def test_conditioning_on_the_token_is_unbiased_for_sampled_sequences() -> None:
    """A two-state language in which the drawn token decides how well the next position is drafted."""
    q = np.array([[0.9, 0.1], [0.5, 0.5]])
    p = np.array([[0.6, 0.4], [0.5, 0.5]])  # after token 1 the models agree: acceptance follows the token
    generator = np.random.default_rng(0)
    n, length, block = 3000, 12, 3
    counted = np.zeros(n)
    tokens = np.zeros((n, length), dtype=int)
    for row in range(n):
        state, place = 0, 0
        for t in range(length):
            counted[row] += place == 0
            drafted = place < block
            token = int(generator.random() < (q if drafted else p)[state, 1])
            if drafted and generator.random() >= min(1, p[state, token] / q[state, token]):
                token, place = int(np.argmax(p[state] - q[state])), 0
            else:
                place = place + 1 if drafted else 0
            tokens[row, t], state = token, token
    before = np.c_[np.zeros(n, dtype=int), tokens[:, :-1]]
    given = np.minimum(q[before, tokens] / p[before, tokens], 1.0).ravel()
    layout = PromptRows.of(np.repeat(np.arange(n), length))
    predicted = expected_calls(given[:, None], layout, block)[:, 0]
    error = np.std(counted - predicted) / np.sqrt(n)
    assert abs(counted.mean() - predicted.mean()) < 4 * error  # fails by chance once in 16,000
    assert given.mean() == pytest.approx((1 - np.abs(p - q)[before].sum(-1) / 2).mean(), abs=0.01)


def test_latency_counts_drafting_and_verifying() -> None:
    model = SpeedModel.of_passes(drafter=0.1, verifier=1.0)
    assert model.relative(np.array(0.25), 5) == pytest.approx(0.375)
