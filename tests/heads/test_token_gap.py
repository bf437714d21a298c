"""The head of form (b): one formula for drafted tokens and the whole vocabulary, folding, the artifact, its rule."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead, TokenGapHead
from deferral_train.heads.check import check_head
from deferral_train.heads.folding import folded
from deferral_train.heads.rules import learned_rule, rule_from_spec
from deferral_train.rules.summary import Summary, summarize
from deferral_train.rules.token_gap import TokenGapRule, costly_tokens, price
from deferral_train.testing import check_rule

VOCABULARY, WIDTH, ROWS = 11, 6, 40
FEATURES = ("verifier_max:logit", "token_embedding", "verifier_entropy:sqrt", "tv", "drafter_margin")


def head_of(features: tuple[str, ...] = FEATURES, **arguments: Any) -> TokenGapHead:
    """A head with weights, normalisation and a matrix of its own."""
    widths = {"vocabulary": VOCABULARY, "matrix": WIDTH} if "token_embedding" in features else {}
    head = TokenGapHead(features, loss="sequence_sampled", widths=widths, **{"body": "linear", **arguments})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        head.mean.copy_(torch.randn(head.mean.shape, generator=generator))
        head.scale.copy_(torch.rand(head.scale.shape, generator=generator) + 0.5)
    if head.inputs.lookups is not None:
        head.inputs.lookups.set_matrix(torch.randn(VOCABULARY, WIDTH, generator=generator))
    return head.eval()


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return 2 * torch.randn(ROWS, VOCABULARY, generator=generator), 2 * torch.randn(
        ROWS, VOCABULARY, generator=generator
    )


def summary(token: torch.Tensor) -> Summary:
    return summarize(*logits(), token=token)


def test_the_formula_in_numpy() -> None:
    head, token = head_of(), torch.arange(ROWS) % VOCABULARY
    at = summary(token)
    position = {
        "verifier_max:logit": torch.logit(at.verifier_max), "verifier_entropy:sqrt": at.verifier_entropy.sqrt(),
        "tv": at.tv, "drafter_margin": at.drafter_margin,
    }  # fmt: skip
    assert head.inputs.lookups is not None
    rows = head.inputs.lookups.matrix.double().numpy()
    mean, scale = head.mean.double().numpy(), head.scale.double().numpy()
    spans = head.inputs.spans
    weight = {name: value.detach().double().numpy() for name, value in head.named_parameters()}
    columns = [
        (position[name].double().numpy() - mean[spans[name]]) * scale[spans[name]]
        for name in spans  # the order in which the body reads them
        if name != "token_embedding"
    ]
    body = np.stack(columns, 1) @ weight["body.0.weight"].T + weight["body.0.bias"]
    here = spans["token_embedding"]
    worth = ((rows - mean[here]) * scale[here]) @ weight["worth.weight"][0]
    log_q, log_p = at.drafter_logprob.double().numpy(), at.verifier_logprob.double().numpy()
    floor = -23.025850929940457
    expected = (
        body[:, 0] + body[:, 1] * np.exp(log_p) + (body[:, 2] * log_p + body[:, 3] * log_q) / floor
        + worth[token.numpy()]
    )  # fmt: skip
    np.testing.assert_allclose(head.gap(at).numpy(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("body", ["linear", "mlp"])
def test_one_token_and_the_whole_vocabulary_are_told_alike_open_and_folded(body: str) -> None:
    head = head_of(body=body)
    q, p = (each.log_softmax(-1) for each in logits())
    whole = head.token_gap(None, q, p, summary(torch.zeros(ROWS, dtype=torch.int64)))
    assert whole.shape == (ROWS, VOCABULARY)
    for token in range(VOCABULARY):
        told = head.gap(summary(torch.full((ROWS,), token)))
        torch.testing.assert_close(told, whole[:, token], rtol=1e-4, atol=1e-5)
    some = torch.tensor([7, 0, 9])
    part = head.token_gap(
        some.expand(ROWS, 3), q[:, some], p[:, some], Summary(dict(summary(some[:1].expand(ROWS))))
    )
    torch.testing.assert_close(part, whole[:, some], rtol=1e-4, atol=1e-5)
    small = folded(head)
    assert isinstance(small, TokenGapHead)
    assert small.inputs.lookups is not None
    assert [name for name, _ in small.inputs.lookups.named_buffers()] == ["token_worth"]
    same = small.token_gap(None, q, p, summary(torch.zeros(ROWS, dtype=torch.int64)))
    torch.testing.assert_close(same, whole, rtol=1e-4, atol=2e-5)
    assert folded(small) is small
    assert whole.std() > 0.1


def test_contract_and_artifact(tmp_path: Path) -> None:
    at = summary(torch.arange(ROWS) % VOCABULARY)
    for name, head in (
        ("open", head_of()),
        ("folded", folded(head_of())),
        ("bare", head_of(("tv", "verifier_max"))),
    ):
        check_head(head)
        head.save_pretrained(tmp_path / name)
        again = DeferralHead.from_pretrained(tmp_path / name)
        assert torch.equal(again.gap(at), head.gap(at))
        rule = rule_from_spec(f"learned:head={tmp_path / name},alpha=0.2")
        assert isinstance(rule, TokenGapRule)
        assert rule.priced
        plain = rule_from_spec(f"learned:head={tmp_path / name},alpha=0.2,priced=false")
        assert plain.dial_value == 0.2
        assert not plain.priced  # type: ignore[attr-defined]


def test_its_rule_is_executed_as_every_other() -> None:
    """Draft, check and correction give the target within 1e-12 on every case that check_rule knows."""
    report = check_rule(TokenGapRule(head=head_of(("verifier_max", "drafter_entropy")), alpha=0.2))
    assert report.kind == "token"
    assert max(report.worst, report.rejection) <= 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
def test_the_priced_rule_against_every_subset(alpha: float) -> None:
    """What it gains under pi_Token, per alpha, near the best of all subsets; the target is pi_Token of that subset."""
    size = 6
    generator = torch.Generator().manual_seed(1)
    raw = [2 * torch.randn(60, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    q, p = (each.softmax(-1) for each in raw)
    worth = torch.rand(60, size, generator=generator, dtype=torch.float64)
    gap = (p * worth).sum(-1, keepdim=True) - worth

    class Known:
        features = ("token", "verifier_max")

        def gap(self, summary: Summary) -> torch.Tensor:
            raise NotImplementedError

        def token_gap(self, tokens: Any, q: torch.Tensor, p: torch.Tensor, summary: Summary) -> torch.Tensor:
            return gap

    rule = TokenGapRule(head=Known(), alpha=alpha, priced=True)
    pi = rule.target(*raw)
    dropped = costly_tokens(q, p, q * gap, alpha)
    torch.testing.assert_close(pi, q * ~dropped + (q * dropped).sum(-1, keepdim=True) * p)

    def gained(pi: torch.Tensor) -> torch.Tensor:
        """What the emitted token's worth gains over q's, less alpha a rejection; by the definitions."""
        return (worth * (pi - q)).sum(-1) - alpha * (q - pi).clamp(min=0).sum(-1)

    subsets = torch.tensor(list(itertools.product([False, True], repeat=size)))
    targets = [q * ~subset + (q * subset).sum(-1, keepdim=True) * p for subset in subsets]
    best = torch.stack([gained(each) for each in targets], -1)
    ours = gained(pi)
    assert (ours >= torch.maximum(best[:, 0], best[:, -1]) - 1e-12).all()
    assert ours.mean() >= 0.97 * best.amax(-1).mean() - 1e-12
    # Each token by its own price gains no more than all of them together, and does not look at its company.
    alone = gained(rule.alone.target(*raw))
    assert ours.mean() >= alone.mean() - 1e-12


def test_price_is_the_chance_of_the_exact_check() -> None:
    q, p = torch.tensor([0.5, 0.2, 0.0]), torch.tensor([0.1, 0.4, 0.5])
    assert price(q.log(), p.log()).tolist() == pytest.approx([0.8, 0.0, 0.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TokenGapHead(("tv",), loss="zero_one"),
            "loss='sequence_sampled'.*got 'verify' and 'zero_one'",
        ),
        (lambda: head_of(("tv", "drafter_logprob")), "leave out drafter_logprob"),
        (lambda: head_of(("token_embedding",)), "needs a feature of the position"),
        (lambda: TokenGapRule(head=object()), "rule token_gap: head is object"),
        (lambda: learned_rule(head_of(), 0.1, tokenwise=False), "leave tokenwise out"),
    ],
)
def test_what_cannot_be_meant(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
