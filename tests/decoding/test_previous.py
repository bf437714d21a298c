"""Previous tokens as a rule sees them online, against the texts that were emitted."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of
from torch import Tensor

from deferral_train.decoding.tokens import TokenRows
from deferral_train.rules.base import PositionRule
from deferral_train.rules.summary import PREVIOUS_TOKENS, Summary


@dataclass(frozen=True, eq=False)
class Watching(PositionRule):
    """Defers at every third position, and remembers what it was shown."""

    name = "watching"
    dial = None
    needs = frozenset({"position", "draft_position", *PREVIOUS_TOKENS})
    stage = "draft"
    reads_drafter_confidence = False

    seen: list[Summary] = field(default_factory=list)

    def defer(self, summary: Summary) -> Tensor:
        self.seen.append(summary)
        return summary["position"] % 3 == 2


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("execution", ["speculative", "token"])
def test_rules_see_the_tokens_that_stand_before_each_place(kind, execution):
    drafter, verifier, _ = pair_of(kind)
    inputs = row_of(kind, prompts_for(kind), 1)
    rule = Watching()
    text = emitted(generate(drafter, verifier, inputs, rule, execution=execution), 0)
    checked = 0
    for summary in rule.seen:
        first = summary["draft_position"] == 0
        for place, position in zip(first.nonzero().tolist(), summary["position"][first].tolist()):
            if position >= len(text):
                continue
            for back, name in enumerate(PREVIOUS_TOKENS, start=1):
                wanted = text[position - back] if position >= back else -1
                assert int(summary[name][tuple(place)]) == wanted
                checked += 1
    assert checked >= 9


def test_rows_of_different_lengths_and_drafted_tokens():
    rows = TokenRows(torch.tensor([[7, 8], [7, 9]]), None, 12, 4, 0)
    rows.write(0, torch.tensor([[20, 21], [30, 31]]))
    rows.extend([2, 1])
    rows.write(0, torch.tensor([[22, 23], [32, 33]]))
    assert rows.previous(1, 3).tolist() == [[21, 22, 23], [30, 32, 33]]
    assert rows.previous(2, 3).tolist() == [[20, 21, 22], [-1, 30, 32]]
    assert rows.previous(3, 3).tolist() == [[-1, 20, 21], [-1, -1, 30]]
