"""The summary against the plain-Python reference, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import reference
import torch

from deferral_train.errors import InputError
from deferral_train.rules import FIELDS, Summary, summarize
from deferral_train.rules.summary import COMPUTED_FIELDS, CONTEXT_FIELDS
from deferral_train.testing import cases


@pytest.mark.parametrize(
    "case", list(cases(seed=5, positions=3)), ids=lambda c: f"{c.name}@{c.temperature:g}"
)
def test_every_field_equals_the_reference(case):
    token = torch.tensor([0, 4, 8])
    summary = summarize(
        case.drafter,
        case.verifier,
        temperature=case.temperature,
        drafter_sampling_logits=case.drafter_sampling,
        verifier_sampling_logits=case.verifier_sampling,
        token=token,
    )
    assert set(summary.names) == COMPUTED_FIELDS
    for n in range(3):
        given = (case.drafter_sampling, case.verifier_sampling)
        sampling = [None if logits is None else logits[n].tolist() for logits in given]
        at = reference.Position(
            case.drafter[n].tolist(), case.verifier[n].tolist(), case.temperature, *sampling
        )
        for name, expected in at.fields(int(token[n])).items():
            assert float(summary[name][n]) == pytest.approx(expected, rel=1e-11, abs=1e-12), name


def test_attribute_and_item_are_the_same_and_a_missing_field_is_named():
    summary = summarize(torch.randn(2, 5), torch.randn(2, 5), fields=["tv", "kl"])
    assert summary.tv is summary["tv"]
    assert summary.shape == (2,)
    with pytest.raises(InputError, match="drafter_max"):
        summary.drafter_max
    with pytest.raises(InputError, match="js"):
        summary["js"]
    assert summary.get("js") is None
    assert "kl" in summary
    assert "js" not in summary


def test_fields_are_described():
    assert set(FIELDS) > CONTEXT_FIELDS
    assert {field.sees for field in FIELDS.values()} == {"drafter", "verifier", "both", "context"}
    assert all(field.meaning and field.dtype in ("float", "int") for field in FIELDS.values())


def test_frozen_selected_and_copied():
    hidden = torch.randn(4, 3)
    summary = Summary({"tv": torch.rand(4), "drafter_hidden": hidden})
    with pytest.raises(AttributeError):
        summary.tv = torch.zeros(4)
    part = summary.select(torch.tensor([True, False, True, False]))
    assert part.shape == (2,)
    assert torch.equal(part.drafter_hidden, hidden[[0, 2]])
    again = copy.deepcopy(summary)
    assert torch.equal(again.tv, summary.tv)


def test_columns_must_share_their_shape_and_be_known():
    with pytest.raises(InputError, match="leading shape"):
        Summary({"tv": torch.rand(4), "kl": torch.rand(3)})
    with pytest.raises(InputError, match="surprise"):
        Summary.from_columns({"surprise": torch.rand(4)})
    with pytest.raises(InputError, match="token="):
        summarize(torch.zeros(1, 3), torch.zeros(1, 3), fields=["drafter_logprob"])
    with pytest.raises(InputError, match="given by the caller"):
        summarize(torch.zeros(1, 3), torch.zeros(1, 3), fields=["position"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    logits = torch.randn(3, 50).to(dtype)
    other = torch.randn(3, 50).to(dtype)
    summary = summarize(logits, other, fields=["tv", "drafter_entropy"])
    assert summary.tv.dtype == torch.float32
    exact = summarize(logits.double(), other.double(), fields=["tv"])
    torch.testing.assert_close(summary.tv.double(), exact.tv, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_logits_are_refused(value):
    logits = torch.zeros(2, 4)
    broken = logits.clone()
    broken[1, 2] = value
    with pytest.raises(InputError, match="drafter_logits"):
        summarize(broken, logits)
    with pytest.raises(InputError, match="verifier_logits"):
        summarize(logits, broken)
    masked = torch.full((2, 4), -torch.inf)
    with pytest.raises(InputError, match="-inf"):
        summarize(masked, logits)


def test_shapes_and_types_are_refused():
    with pytest.raises(InputError, match="vocabularies differ"):
        summarize(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(InputError, match="shape"):
        summarize(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(InputError, match="int64"):
        summarize(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4))
    with pytest.raises(InputError, match="temperature"):
        summarize(torch.zeros(2, 4), torch.zeros(2, 4), temperature=-1.0)
