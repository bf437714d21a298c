"""Block verification: whole texts enumerated in float64, more tokens a call than token by token, and its edges.

Two models by table over a few tokens. All blocks are drafted, all outcomes of the coins are tried; what the code hands
to its coins and its draws is summed up, so that nothing is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import reference
import torch
from instances import build, instances, label, with_target
from test_verify import T, block
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Rule, make_rule, verify, verify_block
from deferral_train.testing import TabularPair

VOCABULARY, DRAFTED = 3, 3
RULES = [
    r for r in with_target() if r.checks_target and r.stage == "verify" and r.dial_value != 0.05
]  # mentored is slow
FEW = [r for r in RULES if r.name in ("lossless", "opt", "token_v3", "lossy", "ensemble", "ears")]


@dataclass
class Enumerated:
    """Texts [V**L] by probability, and the expected number of drafted tokens that stand in the first block."""

    texts: Tensor
    accepted: float


def distributions(rule: Rule, texts: TabularPair, t: int) -> Tensor:
    """The rule's target behind every text of t tokens, [V**t, V]."""
    return rule.target(texts.drafter[t], texts.verifier[t])


def enumerated(
    rule: Rule, texts: TabularPair, monkeypatch, verification: str, bonus: str, drafted: int = DRAFTED
) -> Enumerated:
    """The text that one drafted block begins and the rule's target finishes."""
    blocks = texts.blocks(drafted)
    drafter, verifier = (texts.logits(model, blocks, 1) for model in (texts.drafter, texts.verifier))
    q = torch.softmax(drafter[:, :drafted], -1).gather(-1, blocks.unsqueeze(-1)).squeeze(-1)
    masses = [torch.zeros(texts.vocabulary**t, dtype=torch.float64) for t in range(drafted + 2)]
    expected = 0.0
    for outcome in product([False, True], repeat=drafted):
        chances, drawn = [], []

        def coins(pi, q, uniform, kept=None, outcome=outcome, chances=chances):
            chance = (pi / q).clamp(max=1.0)
            chances.append(chance if kept is None else torch.where(kept, 1.0, chance))
            return torch.tensor(outcome).expand(pi.shape)

        def draws(weights, uniform, drawn=drawn):
            drawn.append(weights / weights.sum(-1, keepdim=True))
            return torch.zeros(len(weights), dtype=torch.int64)

        with monkeypatch.context() as patch:
            patch.setattr(verify, "accepts", coins)
            patch.setattr(verify, "draw", draws)
            verdict = verify_block(
                rule, blocks, drafter, verifier, verification=verification, bonus=bonus, check=False
            )
        (chance,) = chances
        stands = torch.tensor(outcome)
        mass = (q * torch.where(stands, chance, 1 - chance)).prod(1)
        expected += float((mass * verdict.accepted).sum())
        for t in range(drafted + 1):
            here = verdict.accepted == t
            following = drawn[-1 if t == drafted else 0][here]
            place = torch.arange(len(blocks))[here] // texts.vocabulary ** (drafted - t) * texts.vocabulary
            at = (place.unsqueeze(1) + torch.arange(texts.vocabulary)).flatten()
            masses[t + 1].index_add_(0, at, (mass[here].unsqueeze(1) * following).flatten())
    found = texts.finished(masses, lambda t: distributions(rule, texts, t))
    return Enumerated(found, expected)


def autoregressive(rule: Rule, texts: TabularPair) -> Tensor:
    """Texts drawn token by token from the rule's target."""
    length = len(texts.drafter)
    start = [torch.ones(1, dtype=torch.float64)]
    rest = [torch.zeros(texts.vocabulary**t, dtype=torch.float64) for t in range(1, length + 1)]
    return texts.finished(start + rest, lambda t: distributions(rule, texts, t))


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_whole_texts_follow_the_target_and_more_tokens_stand(rule, monkeypatch):
    texts = TabularPair.random(VOCABULARY, DRAFTED + 1, seed=2)
    wanted = autoregressive(rule, texts)
    token, together = (enumerated(rule, texts, monkeypatch, way, "exact") for way in ("token", "block"))
    torch.testing.assert_close(token.texts, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(together.texts, wanted, atol=1e-12, rtol=0)
    assert together.accepted >= token.accepted - 1e-12
    if rule.is_lossless:
        assert together.accepted > token.accepted + 0.01


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("drafted", [1, 2, 4])
def test_lossless_is_the_verifier_at_every_length_and_masked(drafted, seed, monkeypatch):
    texts = TabularPair.random(2, drafted + 1, seed, masked=bool(seed % 2))
    rule = make_rule("lossless")
    found = [enumerated(rule, texts, monkeypatch, way, "verifier", drafted) for way in ("token", "block")]
    torch.testing.assert_close(found[1].texts, autoregressive(rule, texts), atol=1e-12, rtol=0)
    assert found[1].accepted >= found[0].accepted - 1e-12
    if drafted == 1:
        assert found[1].accepted == pytest.approx(found[0].accepted, abs=1e-12)


def test_with_the_verifiers_bonus_a_lossy_rule_emits_other_texts(monkeypatch):
    """The bonus is the verifier's and longer drafts stand, so that it falls at other places than token by token."""
    texts = TabularPair.random(VOCABULARY, DRAFTED + 1, seed=2)
    rule = make_rule("lossy", alpha=0.5)
    token, together = (enumerated(rule, texts, monkeypatch, way, "verifier") for way in ("token", "block"))
    assert float((token.texts - together.texts).abs().sum()) / 2 > 1e-3
    lossless = make_rule("lossless")
    found = [enumerated(lossless, texts, monkeypatch, way, "verifier") for way in ("token", "block")]
    torch.testing.assert_close(found[0].texts, found[1].texts, atol=1e-12, rtol=0)


def plain_coins(rule, drafted, drafter, verifier):
    """Algorithm 2 of the paper with a rule's target, in plain floats: coins of 1..L tokens and w."""
    places = [reference.Position(q, p, 1.0) for q, p in zip(drafter, verifier)]
    targets = [reference.target(rule, at) for at in places]
    reached, coins = [1.0], []
    for x, at, pi in zip(drafted, places, targets):
        reached.append(min(1.0, reached[-1] * pi[x] / at.q[x]))
    for t in range(1, len(drafted)):
        behind = sum(max(0.0, reached[t] * pi - q) for pi, q in zip(targets[t], places[t].q))
        left = behind + 1 - reached[t]
        coins.append(behind / left if left > 0 else 1.0)
    return [*coins, reached[-1]], reached


@pytest.mark.parametrize("rule", FEW, ids=label)
def test_coins_and_corrections_are_those_of_the_algorithm(rule, monkeypatch):
    drafted, drafter, verifier = block(seed=3, rows=12)
    lengths = torch.arange(12) % (T + 1)
    seen, weights = [], []
    with monkeypatch.context() as patch:
        patch.setattr(verify, "accepts", lambda pi, q, u: seen.append(pi) or u < pi)
        patch.setattr(verify, "draw", lambda w, u: weights.append(w) or w.argmax(-1))
        verdict = verify_block(rule, drafted, drafter, verifier, lengths=lengths, verification="block")
    for b, length in enumerate(lengths.tolist()):
        if not length:
            continue
        rows = [one[b, :length].tolist() for one in (drafted, drafter, verifier)]
        coins, reached = plain_coins(rule, *rows)
        assert seen[0][b, :length].tolist() == pytest.approx(coins, abs=1e-9)
        n = int(verdict.accepted[b])
        if n < length:
            at = reference.Position(drafter[b, n].tolist(), verifier[b, n].tolist(), 1.0)
            excess = [max(0.0, reached[n] * y - x) for x, y in zip(at.q, reference.target(rule, at))]
            assert weights[0][b].tolist() == pytest.approx(excess, abs=1e-12)


@pytest.mark.parametrize("rule", FEW, ids=label)
def test_a_row_in_a_ragged_batch_is_as_alone(rule):
    drafted, drafter, verifier = block(seed=8)
    lengths = torch.arange(len(drafted)) % (T + 1)
    numbers = torch.rand(len(drafted), T + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"verification": "block", "bonus": "exact"}
    together = verify_block(rule, drafted, drafter, verifier, lengths=lengths, numbers=numbers, **options)
    for b, length in enumerate(lengths.tolist()):
        own = torch.cat([numbers[b, :length], numbers[b, T:]]).unsqueeze(0)
        row, more = slice(b, b + 1), length + 1
        alone = verify_block(
            rule, drafted[row, :length], drafter[row, :more], verifier[row, :more], numbers=own, **options
        )
        assert alone.accepted[0] == together.accepted[b]
        assert alone.next_token[0] == together.next_token[b]


@pytest.mark.parametrize("rule", instances(), ids=label)
def test_greedy_is_token_by_token_or_refused(rule):
    drafted, drafter, verifier = block(seed=1)
    drafted = drafter[:, :T].argmax(-1)
    if not (rule.is_lossless or rule.checks_target):
        with pytest.raises(
            InputError, match=f"rule {rule.name}: verification 'block' needs a check against one"
        ):
            verify_block(rule, drafted, drafter, verifier, verification="block")
        return
    found = [
        verify_block(rule, drafted, drafter, verifier, temperature=0.0, verification=way)
        for way in ("token", "block")
    ]
    assert torch.equal(found[0].origin, found[1].origin)
    assert torch.equal(found[0].next_token, found[1].next_token)


def test_a_one_hot_draft_is_verified_together():
    """Without a distribution q is a point mass, and block verification is the exact check of each token."""
    drafted, _, verifier = block(seed=2)
    numbers = torch.rand(len(drafted), T + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = [
        verify_block(make_rule("token_v3"), drafted, None, verifier, numbers=numbers, verification=way)
        for way in ("token", "block")
    ]
    assert int(found[1].accepted.sum()) > 0
    assert bool((found[1].next_token >= 0).all())


def test_what_is_not_derived_is_refused():
    drafted, drafter, verifier = block()
    for name in ("cactus", "judge", "fly"):
        with pytest.raises(
            InputError, match=f"rule {name}: verification 'block' needs a check against one target"
        ):
            verify_block(build(name, {}), drafted, drafter, verifier, verification="block")
    with pytest.raises(InputError, match="rule opt: max_request_loss with verification 'block'"):
        verify_block(make_rule("opt"), drafted, drafter, verifier, verification="block", max_request_loss=1.0)
    with pytest.raises(InputError, match="verification is 'blocks'; use one of token, block"):
        verify_block(make_rule("opt"), drafted, drafter, verifier, verification="blocks")
    ends = [
        build("cactus", {"delta": 0.0}),
        build("judge", {"threshold": 1.0}),
        build("fly", {"threshold": 1.1}),
    ]
    for end in ends:
        verify_block(end, drafted, drafter, verifier, verification="block")
