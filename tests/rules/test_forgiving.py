"""Rules that judge a drafted block: FLy against a plain walk and a plain sum over all texts, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import pytest
import reference
import torch
from instances import build
from test_verify import T, block, pick

from deferral_train.errors import InputError
from deferral_train.rules import BlockRule, Dial, Origin, make_rule, verify_block
from deferral_train.rules.sampling import uniforms
from deferral_train.testing import TabularPair, block_rule_texts, check_rule

LENGTH, SIZE = 4, 2  # texts that are enumerated, and their vocabulary


def unsure(logits: list[float]) -> float:
    """-sum p log p over the three likeliest tokens."""
    top = sorted(reference.softmax(logits))[-3:]
    return -math.fsum(x * math.log(x) for x in top if x > 0)


def forgiven(rule, passes: list[bool], verifier: list[list[float]]) -> list[bool]:
    """The rule in words: failed, unsure there, and the window behind lies within the draft and passes."""
    found = []
    for t, passed in enumerate(passes):
        window = passes[t + 1 : t + 1 + rule.window]
        agrees = len(window) == rule.window and all(window)
        found.append(not passed and agrees and unsure(verifier[t]) >= rule.threshold)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("parameters", [{"threshold": 0.6, "window": 1}, {"threshold": 0.0, "window": 2}])
def test_equals_a_plain_walk_with_the_same_numbers(parameters, temperature):
    rule = make_rule("fly", **parameters)
    drafted, drafter, verifier = block(seed=5, rows=60, spread=2.0)
    if temperature == 0:
        drafted = drafter[:, :T].argmax(-1)
    lengths = torch.arange(60) % (T + 1)
    numbers, last = uniforms(60, T, torch.Generator().manual_seed(9), verifier)
    verdict = verify_block(
        rule, drafted, drafter, verifier, temperature=temperature, lengths=lengths,
        generator=torch.Generator().manual_seed(9),
    )  # fmt: skip
    kept = 0
    for b, length in enumerate(lengths.tolist()):
        places = [
            reference.Position(drafter[b, t].tolist(), verifier[b, t].tolist(), temperature)
            for t in range(T + 1)
        ]
        tokens = drafted[b, :length].tolist()
        passes = [u < at.p[x] / at.q[x] for u, at, x in zip(numbers[b].tolist(), places, tokens)]
        if temperature == 0:
            passes = [x == at.v_p for at, x in zip(places, tokens)]
        forgives = forgiven(rule, passes, verifier[b].tolist())
        stands = [a or f for a, f in zip(passes, forgives)]
        n = stands.index(False) if False in stands else length
        at = places[n]
        excess = [max(0.0, y - x) for x, y in zip(at.q, at.p)] if n < length else at.p
        assert int(verdict.accepted[b]) == n
        assert int(verdict.next_token[b]) == pick(excess if sum(excess) > 0 else at.p, float(last[b]))
        origins = [Origin.KEPT if f else Origin.ACCEPTED for f in forgives[:n]]
        assert verdict.origin[b, :n].tolist() == origins
        kept += origins.count(Origin.KEPT)
    assert kept > 3


def texts_by_hand(rule, texts: TabularPair) -> dict[tuple[int, ...], float]:
    """Every text's probability: blocks, checks and corrections one after another in plain floats."""
    count = LENGTH - 1

    def at(prefix: tuple[int, ...]) -> reference.Position:
        place = int("".join(map(str, prefix)) or "0", SIZE)
        return reference.Position(
            *(m[len(prefix)][place].tolist() for m in (texts.drafter, texts.verifier)), 1.0
        )

    found = dict.fromkeys(product(range(SIZE), repeat=LENGTH), 0.0)
    for tokens in product(range(SIZE), repeat=count):
        places = [at(tokens[:t]) for t in range(count + 1)]
        for passes in product([False, True], repeat=count):
            mass = 1.0
            for here, x, passed in zip(places, tokens, passes):
                ratio = min(1.0, here.p[x] / here.q[x])
                mass *= here.q[x] * (ratio if passed else 1 - ratio)
            if mass == 0:
                continue
            stands = [
                a or f for a, f in zip(passes, forgiven(rule, list(passes), [p.verifier for p in places]))
            ]
            n = stands.index(False) if False in stands else count
            here = places[n]
            weights = [max(0.0, b - a) for a, b in zip(here.q, here.p)] if n < count else here.p
            for v, weight in enumerate(weights):
                text, share = (*tokens[:n], v), mass * weight / sum(weights)
                for rest in product(range(SIZE), repeat=LENGTH - len(text)):
                    whole = (*text, *rest)
                    after = math.prod(at(whole[:t]).p[whole[t]] for t in range(len(text), LENGTH))
                    found[whole] += share * after
    return found


def test_whole_texts_are_those_of_a_plain_sum():
    rule = make_rule("fly", threshold=0.2, window=1)
    texts = TabularPair.random(SIZE, LENGTH, seed=4)
    by_hand = texts_by_hand(rule, texts)
    found = block_rule_texts(rule, texts, LENGTH - 1)
    assert sum(by_hand.values()) == pytest.approx(1.0, abs=1e-12)
    expected = torch.tensor([by_hand[text] for text in sorted(by_hand)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    lossless = block_rule_texts(rule.with_dial(1.1), texts, LENGTH - 1)
    assert float((found - lossless).abs().max()) > 1e-3


@dataclass(frozen=True)
class All(BlockRule):
    """Forgives everything, and says that it does not."""

    name = "all"
    dial = Dial("share", 0.0, 1.0, lossless=0.0, drafter=None)
    share: float = 0.5

    def forgives(self, passes, distributions, summary):
        return torch.ones_like(passes)


def test_a_lossless_end_that_is_none_is_caught():
    with pytest.raises(AssertionError, match="all: its lossless end misses"):
        check_rule(All())


def test_what_needs_a_target_is_refused_by_name():
    rule, (drafted, drafter, verifier) = build("fly", {}), block()
    with pytest.raises(InputError, match="rule fly judges drafted blocks as a whole"):
        rule.target(drafter, verifier)
    with pytest.raises(InputError, match="rule fly: bonus 'exact' is drawn from a rule's target"):
        verify_block(rule, drafted, drafter, verifier, bonus="exact")
    with pytest.raises(InputError, match="window is 0"):
        make_rule("fly", window=0)
    end = rule.with_dial(1.1)
    assert torch.equal(end.target(drafter, verifier), torch.softmax(verifier, -1))
    verify_block(end, drafted, drafter, verifier, bonus="exact")


def test_a_limit_charges_what_is_forgiven():
    rule = make_rule("fly", threshold=0.0, window=1)
    drafted, drafter, verifier = block(seed=5, rows=60, spread=2.0)
    options = {"temperature": 1.0, "numbers": torch.rand(60, T + 1, dtype=torch.float64)}
    free = verify_block(rule, drafted, drafter, verifier, **options)
    loose = verify_block(rule, drafted, drafter, verifier, max_request_loss=1e9, **options)
    assert torch.equal(free.accepted, loose.accepted)
    assert torch.equal(free.next_token, loose.next_token)
    charged = (free.origin == Origin.KEPT).any(1)
    assert bool((loose.spent > 0)[charged].any())
    assert not bool(loose.spent[~charged].any())
    strict = verify_block(rule, drafted, drafter, verifier, max_request_loss=0.0, **options)
    lossless = verify_block(make_rule("lossless"), drafted, drafter, verifier, **options)
    assert torch.equal(strict.accepted, lossless.accepted)
    assert torch.equal(strict.next_token, lossless.next_token)
