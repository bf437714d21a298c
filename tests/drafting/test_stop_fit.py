"""The fitted threshold against walking along every chain, and where it must end up."""

from __future__ import annotations

import random

import pytest
import torch

from deferral_train.drafting.stop_fit import fit_chains
from deferral_train.errors import InputError


def walked(confidence, acceptance, prompt, cost: float, longest: int, threshold: float) -> float:
    """Tokens per verifier time, block by block, as CumulativeStop would have cut it."""
    tokens = spent = 0.0
    for start in range(len(prompt)):
        chance = reach = 1.0
        tokens, spent = tokens + 1, spent + 1
        for row in range(start, min(start + longest, len(prompt))):
            if prompt[row] != prompt[start]:
                break
            chance, reach = chance * confidence[row], reach * acceptance[row]
            tokens, spent = tokens + reach, spent + cost
            if chance < threshold:
                break
    return tokens / spent


def test_the_fit_is_the_best_of_all_thresholds() -> None:
    numbers = random.Random(3)
    confidence = [numbers.choice([0.3, 0.6, 0.9, 0.95]) for _ in range(60)]
    acceptance = [float(numbers.random() < value) for value in confidence]
    prompt = [row // 20 for row in range(60)]
    fit = fit_chains(*map(torch.tensor, (confidence, acceptance, prompt)), cost=0.2, longest=6)
    arguments = (confidence, acceptance, prompt, 0.2, 6)
    # Single precision columns: a product may fall on either side of itself.
    around = [fit.threshold * (1 - 1e-5), fit.threshold * (1 + 1e-5)]
    assert max(walked(*arguments, value) for value in around) == pytest.approx(fit.speed, rel=1e-6)
    assert walked(*arguments, 0.0) == pytest.approx(fit.constant)
    assert fit.speed > fit.constant
    grid = [walked(*arguments, step / 400) for step in range(401)]
    assert fit.speed >= max(grid) - 1e-9


def test_free_drafts_never_stop_and_dear_ones_stop_at_once() -> None:
    columns = torch.full((50,), 0.9), torch.full((50,), 0.9), torch.zeros(50, dtype=torch.long)
    assert fit_chains(*columns, cost=1e-9, longest=5).drafted == pytest.approx(4.8)  # the last rows end
    dear = fit_chains(*columns, cost=5.0, longest=5)
    assert dear.drafted == pytest.approx(1.0)
    assert dear.speed > dear.constant


def test_what_cannot_be_meant_is_refused() -> None:
    columns = torch.ones(2), torch.ones(2), torch.zeros(2)
    with pytest.raises(InputError, match="cost is 0"):
        fit_chains(*columns, cost=0, longest=3)
    with pytest.raises(InputError, match="longest is 0"):
        fit_chains(*columns, cost=0.1, longest=0)
    with pytest.raises(InputError, match="no rows"):
        fit_chains(*(column[:0] for column in columns), cost=0.1, longest=3)
