"""A few seeds of the fuzzer of decoding (fuzz/decoding.py): the verifier's own text, or one line of refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fuzz.decoding import Case, draw, judge, shortened

SEEDS = 32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, SEEDS, 8))
def test_random_calls_give_the_verifier_s_own_text(first: int) -> None:
    verdicts = {seed: judge(draw(seed)) for seed in range(first, first + 8)}
    assert {seed: one for seed, one in verdicts.items() if one.found} == {}
    assert sum(one.kind == "equal" for one in verdicts.values()) >= 3


@pytest.mark.filterwarnings("ignore")
def test_a_text_that_differs_is_found_and_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    case = plain()
    assert judge(case).kind == "equal"
    lossy = replace(case, drafting={**case.drafting, "rule": ("drafter_only", None), "drafter": "far"})
    found = judge(lossy)
    assert found.kind == "different" and "scores" in found.text
    small = shortened(lossy)
    assert len(small.prompts) == 1 and not small.settings and not small.criteria
    # An exception that is no InputError is one, too.
    monkeypatch.setattr("deferral_train.decoding.loop.verify", lambda *_: torch.zeros(1)[7])
    assert judge(case).kind == "error"


def plain() -> Case:
    """A case without anything that refuses."""
    return next(
        case for case in map(draw, range(1000)) if case.architecture == "llama" and len(case.prompts) > 1
        and case.limit.get("max_new_tokens", 0) > 6 and case.settings and case.drafting["drafter"] == "near"
        and case.drafting["execution"] == "speculative" and case.drafting["plan"] is None and judge(case).kind == "equal"
    )  # fmt: skip
