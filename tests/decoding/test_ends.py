"""Where a row ends, as ``generate`` has it: a caller's length criterion, criteria without an end-of-sequence token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding.small import LEFT, ONE, TWO, cascade, llama, near, own
from transformers.generation import logits_process as hf
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList as Criteria

from deferral_train.errors import InputError
from deferral_train.rules import make_rule


@pytest.mark.parametrize("limit", [3, 7, 8, 12, 30])
@pytest.mark.parametrize("inputs", [ONE, LEFT], ids=["one", "ragged"])
def test_a_length_criterion_of_the_caller_stands_in_the_place_of_the_configuration_s(
    limit: int, inputs: dict[str, torch.Tensor]
) -> None:
    verifier = llama()
    options = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    expected = own(verifier, inputs, stopping_criteria=Criteria([MaxLengthCriteria(limit)]), **options)
    assert expected.shape[1] == max(limit, 8)
    found = cascade(
        verifier, inputs, near(verifier), stopping_criteria=Criteria([MaxLengthCriteria(limit)]), **options
    )
    assert torch.equal(found, expected)


def test_a_length_criterion_beyond_the_context_is_refused() -> None:
    with pytest.raises(InputError, match="exceed the drafter's context of 128"):
        cascade(llama(), ONE, llama(), stopping_criteria=Criteria([MaxLengthCriteria(500)]))


class EndsAt(StoppingCriteria):
    """Ends each row once its last token is one of its own."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.tokens


@pytest.mark.parametrize("execution", ["speculative", "token", "lazy", "sequence"])
@pytest.mark.parametrize("drafts", [1, 5])
def test_without_an_end_token_rows_end_together(execution: str, drafts: int) -> None:
    verifier = llama()
    options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}
    plain = own(verifier, TWO, **options)[:, 7:]
    row = plain[1].tolist()
    new = max(at for at, token in enumerate(row) if token not in row[:at])
    ends = [int(plain[0, 0]), int(plain[1, new])]  # at once, and as late as a new token comes
    expected = own(verifier, TWO, stopping_criteria=Criteria([EndsAt(ends)]), **options)
    assert expected.shape[1] == 7 + new + 1 > 9
    assert torch.equal(expected[0, 8:], plain[0, 1 : new + 1])  # row 0 is written on behind its end
    options |= {"rule": make_rule("chow", alpha=0.0), "execution": execution, "num_draft_tokens": drafts}
    found = cascade(verifier, TWO, near(verifier), stopping_criteria=Criteria([EndsAt(ends)]), **options)
    assert torch.equal(found, expected)
    # With an end token, also one that the caller's own criterion brings, a row that is over is padded.
    for more in ({"eos_token_id": 39}, {}):
        criteria = [EndsAt(ends)] if more else [EndsAt(ends), EosTokenCriteria([39])]
        padded = own(
            verifier,
            TWO,
            **{"eos_token_id": None, "pad_token_id": 0, **more},
            stopping_criteria=Criteria(criteria),
        )
        assert not torch.equal(padded, expected)
        found = cascade(
            verifier, TWO, near(verifier), **{**options, **more}, stopping_criteria=Criteria(criteria)
        )
        assert torch.equal(found, padded)


@pytest.mark.parametrize(
    "warpers",
    [
        lambda: [hf.TypicalLogitsWarper(0.1)],
        lambda: [hf.TopKLogitsWarper(3), hf.SequenceBiasLogitsProcessor({(t,): -9.0 for t in range(2, 32)})],
        lambda: [
            hf.TemperatureLogitsWarper(4.0),
            hf.SequenceBiasLogitsProcessor({(t,): 1.5 for t in range(22, 40)}),
        ],
        lambda: [
            hf.SequenceBiasLogitsProcessor({(t,): 1.5 for t in range(22, 40)}),
            hf.MinPLogitsWarper(0.5),
        ],
    ],
)
@pytest.mark.parametrize("inputs", [ONE, LEFT], ids=["one", "ragged"])
def test_warpers_of_the_caller_are_processors_of_greedy_text(
    warpers: Any, inputs: dict[str, torch.Tensor]
) -> None:
    verifier = llama()
    expected = own(verifier, inputs, logits_processor=hf.LogitsProcessorList(warpers()))
    assert not torch.equal(expected, own(verifier, inputs))
    for execution in ("speculative", "token", "lazy"):
        found = cascade(
            verifier, inputs, near(verifier), logits_processor=hf.LogitsProcessorList(warpers()),
            rule=make_rule("chow", alpha=0.0), execution=execution,
        )  # fmt: skip
        assert torch.equal(found, expected)
