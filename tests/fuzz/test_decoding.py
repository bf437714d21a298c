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
@pytest.mark.parametrize(
    ("seed", "kind", "said"),
    [
        # A row ended by its correction let the others go on to places that no processor had seen.
        (52013, "equal", ""),
        # Chunks of an encoder-decoder's prefill lose the mask of the encoder's padding in generate itself.
        (50425, "refused", "prefill_chunk_size is 4"),
        (52602, "refused", "prefill_chunk_size is 4"),
    ],
)
def test_what_the_fuzzer_found_stays_mended(seed: int, kind: str, said: str) -> None:
    verdict = judge(draw(seed))
    assert verdict.kind == kind, verdict
    assert said in verdict.text


@pytest.mark.filterwarnings("ignore")
def test_a_text_that_differs_is_found_and_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    case = plain()
    assert judge(case).kind == "equal"
    lossy = replace(case, drafting={**case.drafting, "rule": ("drafter_only", None), "drafter": "far"})
    found = judge(lossy)
    assert found.kind == "different"
    assert "scores" in found.text
    small = shortened(lossy)
    assert len(small.prompts) == 1
    assert not small.settings
    assert not small.criteria
    # An exception that is no InputError is one, too.
    monkeypatch.setattr("deferral_train.decoding.generate.verify_block", lambda *_, **__: torch.zeros(1)[7])
    assert judge(case).kind == "error"


def plain() -> Case:
    """A case without anything that refuses."""
    drafting = {"execution": "speculative", "drafter": "near", "num_draft_tokens": 4, "bonus": "verifier"}
    return replace(
        draw(0), architecture="llama", prompts=((5, 9, 12), (7, 30)), processors={}, criteria={}, inherited=False,
        settings={"repetition_penalty": {"repetition_penalty": 1.3}}, limit={"max_new_tokens": 12}, mask=True,
        ends={"eos_token_id": 1, "pad_token_id": 0}, drafting={**drafting, "rule": ("lossless", None)},
    )  # fmt: skip
