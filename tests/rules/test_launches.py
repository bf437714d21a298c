"""What verifying a block costs an accelerator: operators and copies to the host, for every rule of the catalogue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from instances import instances, label

from deferral_train.rules import verify_block

sys.path.insert(0, str(Path(__file__).parents[1]))
from launches import LaunchCounter

B, T, V = 1, 5, 64


def counted(rule, temperature, **options):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, B, T + 1, V, generator=generator)
    drafted = logits[0, :, :T].argmax(-1)
    with LaunchCounter() as count:
        verify_block(
            rule, drafted, logits[0, :, :T], logits[1], temperature=temperature, check=False, **options
        )
    return count


@pytest.mark.parametrize("rule", instances(), ids=label)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_block(rule, temperature):
    for options in ({}, {"lengths": torch.full((B,), T)}, {"bonus": "none"}):
        count = counted(rule, temperature, **options)
        assert count.host_copies == 0, count.copies
        print(f"{label(rule):24s} T={temperature} {list(options)} {count.launches} {dict(count.operators)}")
