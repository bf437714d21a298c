"""The NumPy estimate of a gap head is the head's."""

from __future__ import annotations

import pytest
import torch

from deferral_train.heads import serving
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.features import TRANSFORMS
from deferral_train.heads.gap import GapHead
from deferral_train.rules.summary import Summary

FEATURES = (
    "drafter_max:logit",
    "verifier_max:log",
    "verifier_max",
    "tv:sqrt",
    "kl:log1p",
    "drafter_entropy:square",
)


def summary_of(rows: int) -> Summary:
    generator = torch.Generator().manual_seed(2)
    fields = {"drafter_max", "verifier_max", "tv", "kl", "drafter_entropy"}
    columns = {name: torch.rand(rows, 3, generator=generator) for name in fields}
    columns["verifier_max"][0, 0] = 0.0
    columns["drafter_max"][0, 1] = 1.0
    argmax = torch.randint(0, 2, (2, rows, 3), generator=generator)
    return Summary({**columns, "drafter_argmax": argmax[0], "verifier_argmax": argmax[1]})


@pytest.mark.parametrize("body", ["linear", "mlp"])
@pytest.mark.parametrize("loss", ["zero_one", "log"])
def test_equal_to_the_reference(body: str, loss: str) -> None:
    torch.manual_seed(5)
    head = GapHead(FEATURES, loss=loss, body=body).eval()
    torch.nn.init.normal_(head.body[-1].weight)
    head.mean.normal_()
    assert serving.is_plain(head)
    summary = summary_of(40)
    found, expected = head.gap(summary), DeferralHead.gap(head, summary)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        head.body[-1].bias.add_(1.0)
    changed = DeferralHead.gap(head, summary)
    assert not torch.equal(changed, expected)
    torch.testing.assert_close(head.gap(summary), changed, atol=2e-5, rtol=1e-5)


def test_what_is_not_a_number_defers() -> None:
    head = GapHead(("drafter_max",), loss="log").eval()
    summary = Summary({"drafter_max": torch.tensor([float("nan"), 0.5])})
    assert head.gap(summary).tolist()[0] == float("inf")
    assert torch.equal(head.gap(summary), DeferralHead.gap(head, summary))


def test_every_transform_is_known_and_other_heads_take_the_reference() -> None:
    assert set(serving.TRANSFORMS) == set(TRANSFORMS)
    assert not serving.is_plain(GapHead(("drafter_max",), recalibration="platt"))
    assert not serving.is_plain(GapHead(("drafter_hidden",), widths={"drafter_hidden": 4}))


def test_weights_made_in_inference_mode_take_the_reference() -> None:
    """They have no version by which a change of them would be seen."""
    with torch.inference_mode():
        head = GapHead(("drafter_max", "verifier_max")).eval()
        columns = {"drafter_max": torch.tensor([0.3, 0.6]), "verifier_max": torch.tensor([0.8, 0.5])}
        argmaxes = {"drafter_argmax": torch.tensor([1, 2]), "verifier_argmax": torch.tensor([3, 2])}
        summary = Summary(columns | argmaxes)
        expected = DeferralHead.gap(head, summary)
        assert torch.equal(head.gap(summary), expected)
    assert serving.plain(head) is None
