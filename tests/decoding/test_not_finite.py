"""What is not finite: forbidden tokens in a token log are null; logits that are NaN or infinite are refused by name."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from decoding.small import LEFT, ONE, cascade, llama, near, own

from deferral_train.decoding.drafting import DraftCascade, GivenDraft, MaxGram, Plan
from deferral_train.decoding.token_log import TokenLog
from deferral_train.errors import InputError
from deferral_train.rules import make_rule

BANNED = list(range(3, 39))


def drafters(kind: str) -> Any:
    model = near(llama())
    if kind == "copies":
        return DraftCascade([model], Plan(((2, 3), (0, 2)), max_gram=MaxGram()))
    if kind == "max_gram":
        return DraftCascade([], Plan(((4,),), max_gram=MaxGram()))
    return GivenDraft([[8, 24, 2], [2, 2]]) if kind == "given" else model


@pytest.mark.parametrize("kind", ["model", "copies", "max_gram", "given"])
@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": BANNED},
        {"forced_eos_token_id": 1, "max_new_tokens": 4},
        {"begin_suppress_tokens": BANNED, "min_new_tokens": 8},
        {"bad_words_ids": [[token] for token in BANNED]},
    ],
    ids=lambda one: next(iter(one)),
)
def test_a_token_log_writes_null_for_what_is_forbidden(kind: str, options: dict[str, Any]) -> None:
    verifier, log = llama(), TokenLog(2, 6)
    rule = make_rule("opt_verifier", alpha=-1.0)
    found = cascade(
        verifier, LEFT, drafters(kind), rule=rule, token_log=log, return_dict_in_generate=True, **options
    )
    truth = own(verifier, LEFT, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(found.sequences, truth.sequences)
    nulls = 0
    for row, count in enumerate(found.stats.emitted.tolist()):
        entries = json.loads(json.dumps(log.of(row, count), allow_nan=False))
        assert len(entries) == count
        for place, entry in enumerate(entries):
            expected = torch.log_softmax(truth.scores[place][row], dim=-1)
            for token, logged in entry["verifier_top"]:
                nulls += logged is None
                right = float(expected[token])
                assert (logged is None and right == -math.inf) or abs(logged - right) < 1e-3
            assert entry["verifier_top"][0][0] == int(truth.sequences[row, 7 + place])
    assert nulls > 0


def broken(value: float, tokens: slice = slice(None)) -> Any:
    """A model whose logits of some tokens are not finite."""
    model = copy.deepcopy(llama())
    model.lm_head.weight[tokens] = value
    return model


@pytest.mark.parametrize("inputs", [ONE, LEFT], ids=["one", "ragged"])
@pytest.mark.parametrize("execution", ["speculative", "token", "lazy", "sequence"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tokens", [slice(None), slice(7, 8)], ids=["all", "one token"])
@pytest.mark.parametrize("who", ["drafter", "verifier"])
def test_logits_that_are_not_numbers_are_refused(
    inputs: dict[str, torch.Tensor], execution: str, sampled: bool, tokens: slice, who: str
) -> None:
    good, bad = llama(), broken(math.nan, tokens)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0} if sampled else {}
    if sampled:
        options["generator"] = torch.Generator().manual_seed(0)
    rule = make_rule("chow", alpha=0.5)
    drafter, verifier = (bad, good) if who == "drafter" else (good, bad)
    if who == "verifier" and execution != "speculative":
        rule = make_rule("chow", alpha=0.0)  # it is read at every token
    with pytest.raises(InputError, match=r"logits (are|has) NaN") as caught:
        cascade(verifier, inputs, drafter, rule=rule, execution=execution, **options)
    assert "\n" not in str(caught.value)


def test_tokens_that_are_all_forbidden_are_refused() -> None:
    with pytest.raises(InputError, match="only -inf"):
        cascade(llama(), ONE, llama(), suppress_tokens=list(range(40)))
