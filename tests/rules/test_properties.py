"""Properties over shapes, dtypes, permuted vocabularies and padding columns; gradients of what is differentiable."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import with_target

from deferral_train.rules import make_rule, summarize
from deferral_train.rules.emission import emitted_distribution, rejection_mass

# Token ids carry no meaning for these; csd, and the heads of judge and token_gap among the instances, look at the id.
ANONYMOUS = [rule for rule in with_target() if rule.name not in ("judge", "token_gap", "csd")]
RULE = st.sampled_from(ANONYMOUS)
TEMPERATURE = st.sampled_from([0.0, 0.5, 1.0, 1.7])
SHAPE = st.lists(st.integers(1, 3), min_size=0, max_size=3)
COMMON = settings(max_examples=60, deadline=None, derandomize=True)


def pair(shape, vocabulary, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, *shape, vocabulary, generator=generator, dtype=torch.float64) * 2
    return logits[0].to(dtype), logits[1].to(dtype)


@COMMON
@given(RULE, SHAPE, st.integers(1, 12), TEMPERATURE, st.integers(0, 999))
def test_any_leading_shape(rule, shape, vocabulary, temperature, seed):
    drafter, verifier = pair(shape, vocabulary, seed)
    pi = rule.target(drafter, verifier, temperature)
    assert pi.shape == (*shape, vocabulary)
    assert bool((pi >= 0).all())
    torch.testing.assert_close(pi.sum(-1), torch.ones(shape, dtype=torch.float64), atol=1e-12, rtol=0)
    flat = rule.target(drafter.reshape(-1, vocabulary), verifier.reshape(-1, vocabulary), temperature)
    torch.testing.assert_close(pi.reshape(-1, vocabulary), flat, atol=1e-13, rtol=0)


@COMMON
@given(
    RULE, st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), st.integers(0, 999)
)
def test_dtypes(rule, dtype, seed):
    drafter, verifier = pair((3,), 9, seed, dtype)
    pi = rule.target(drafter, verifier)
    assert pi.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(pi.sum(-1), torch.ones(3, dtype=pi.dtype), atol=tolerance, rtol=0)


@COMMON
@given(RULE, TEMPERATURE, st.integers(0, 999))
def test_permuting_the_vocabulary_permutes_the_distribution(rule, temperature, seed):
    drafter, verifier = pair((4,), 9, seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    permuted = rule.target(drafter[:, order], verifier[:, order], temperature)
    torch.testing.assert_close(
        permuted, rule.target(drafter, verifier, temperature)[:, order], atol=1e-9, rtol=0
    )


@COMMON
@given(RULE, TEMPERATURE, st.integers(1, 5), st.integers(0, 999))
def test_padding_columns_change_nothing(rule, temperature, columns, seed):
    drafter, verifier = pair((4,), 9, seed)
    padding = torch.full((4, columns), -torch.inf, dtype=torch.float64)
    padded = rule.target(torch.cat([drafter, padding], -1), torch.cat([verifier, padding], -1), temperature)
    assert not bool(padded[:, 9:].any())
    torch.testing.assert_close(padded[:, :9], rule.target(drafter, verifier, temperature), atol=1e-9, rtol=0)


@COMMON
@given(st.integers(2, 10), st.integers(0, 999))
def test_any_distribution_is_emitted_by_its_own_acceptance_and_residual(vocabulary, seed):
    q, pi = (torch.softmax(logits, -1) for logits in pair((5,), vocabulary, seed))
    torch.testing.assert_close(emitted_distribution(pi, q), pi, atol=1e-14, rtol=0)
    torch.testing.assert_close(rejection_mass(pi, q), (pi - q).abs().sum(-1) / 2, atol=1e-14, rtol=0)


@COMMON
@given(st.sampled_from(["opt", "lossy", "lenient"]), st.integers(0, 999))
def test_rejection_falls_along_the_dial(name, seed):
    """From the verifier's end to the drafter's, a drafted token is rejected less and less."""
    drafter, verifier = pair((6,), 9, seed)
    q = torch.softmax(drafter, -1)
    rule = make_rule(name)
    rates = [rejection_mass(rule.with_dial(v).target(drafter, verifier), q) for v in rule.dial.grid(6)]
    for tighter, looser in pairwise(rates):
        assert bool((looser <= tighter + 1e-12).all())


@pytest.mark.parametrize(
    "rule", [r for r in ANONYMOUS if r.name != "mentored"], ids=lambda r: f"{r.name}-{r.dial_value}"
)
def test_gradients_of_the_distribution_are_finite(rule):
    drafter, verifier = (logits.requires_grad_() for logits in pair((4,), 9, 1))
    pi = rule.target(drafter, verifier)
    (pi * torch.linspace(0, 1, 9, dtype=torch.float64)).sum().backward()
    for logits in (drafter, verifier):
        assert logits.grad is None or bool(torch.isfinite(logits.grad).all())


def test_gradients_of_the_summary_are_finite():
    drafter, verifier = (logits.requires_grad_() for logits in pair((4,), 9, 1))
    masked = verifier.masked_fill(torch.arange(9) == 2, -torch.inf)
    summary = summarize(drafter.masked_fill(torch.arange(9) == 2, -torch.inf), masked)
    sum(summary[name].sum() for name in summary if summary[name].requires_grad).backward()
    assert bool(torch.isfinite(drafter.grad).all())
    assert bool(torch.isfinite(verifier.grad).all())
