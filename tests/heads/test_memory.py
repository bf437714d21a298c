"""The memory behind ``memory_k`` against plain dictionaries of counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.heads import GapHead
from deferral_train.heads.check import check_head
from deferral_train.heads.memory import PRIOR, Memory
from deferral_train.rules.summary import PREVIOUS_TOKENS, Summary

BIG = 151_936  # tokens of a large vocabulary


def texts(rows=600, seed=0, vocabulary=5):
    """Summary of rows with previous tokens and both argmaxes, and their gold tokens."""
    rng = np.random.default_rng(seed)
    names = (*PREVIOUS_TOKENS, "drafter_argmax", "verifier_argmax")
    columns = {name: torch.from_numpy(rng.integers(-1, vocabulary, rows)) * (BIG // 5) for name in names}
    for name in PREVIOUS_TOKENS:
        columns[name] = columns[name].clamp_min(-1)
    return Summary(columns), torch.from_numpy(rng.integers(0, vocabulary, rows)) * (BIG // 5)


def counted(summary, gold, order):
    contexts, pairs = Counter(), Counter()
    for row in range(len(gold)):
        context = tuple(int(summary[name][row]) for name in PREVIOUS_TOKENS[:order])
        contexts[context] += 1
        pairs[context, int(gold[row])] += 1
    return contexts, pairs


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("leave_out", [False, True])
def test_columns_are_those_of_plain_counting(order, leave_out):
    summary, gold = texts()
    memory = Memory()
    memory.fit(summary, gold, [1, 2, 3])
    asked, own = (summary, gold) if leave_out else texts(seed=1)
    found = memory.columns(asked, order, own if leave_out else None)
    contexts, pairs = counted(summary, gold, order)
    for row in range(len(own)):
        context = tuple(int(asked[name][row]) for name in PREVIOUS_TOKENS[:order])
        if leave_out:  # the other rows alone
            contexts[context] -= 1
            pairs[context, int(own[row])] -= 1
        n, a, b = (
            contexts[context],
            pairs[context, int(asked["verifier_argmax"][row])],
            pairs[context, int(asked["drafter_argmax"][row])],
        )
        wanted = [np.log1p(n), a / (n + PRIOR), b / (n + PRIOR), (a - b) / (n + PRIOR)]
        np.testing.assert_allclose(found[row], wanted, rtol=1e-6)
        if leave_out:
            contexts[context] += 1
            pairs[context, int(own[row])] += 1


def test_leaving_itself_out_is_the_memory_without_the_row():
    summary, gold = texts(40)
    whole, rows = Memory(), torch.arange(40)
    whole.fit(summary, gold, [2])
    found = whole.columns(summary, 2, gold)
    for row in range(40):
        without = Memory()
        without.fit(summary.select(rows != row), gold[rows != row], [2])
        torch.testing.assert_close(without.columns(summary.select(rows == row), 2)[0], found[row])


def test_an_unfitted_memory_has_seen_nothing():
    summary, _ = texts(7)
    assert Memory().columns(summary, 3).abs().max() == 0


def test_a_head_with_memory_keeps_its_contract_and_its_counts(tmp_path):
    summary, gold = texts()
    head = GapHead(["verifier_max", "memory_1", "memory_3"], hidden=(4,))
    head.inputs.memory.fit(summary, gold, head.inputs.orders)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    check_head(head.eval())
    again = GapHead.from_pretrained(head.save_pretrained(tmp_path))
    assert again.config["memory_entries"] == head.inputs.memory.entries > 0
    full = summary.with_fields({"verifier_max": torch.rand(len(gold))})
    assert torch.equal(again.gap(full), head.gap(full))
    assert again.gap(full).unique().numel() > 100


def test_refusals_name_what_is_wrong():
    with pytest.raises(InputError, match="memory_1"):
        GapHead(["drafter_max", "memory_1"], stage="draft")
    with pytest.raises(InputError, match="memory_4"):
        GapHead(["memory_4"])
    with pytest.raises(InputError, match="memory_entries=-3"):
        GapHead(["memory_1"], memory_entries=-3)
