"""The loop's distribution at batch 1, enumerated: every outcome of every random choice, with its probability.

Two tabular models over a few tokens, whose distributions depend on the place and the token before it. The three
places where the loop draws (a drafted token, a check, a correction or bonus) ask an oracle instead, which walks
through all answers; nothing is sampled, so that nothing can fail by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rules.instances import TABLE, TokenCost
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig

from deferral_train.decoding import cascade_generate
from deferral_train.decoding.distributions import SamplingDistributions
from deferral_train.rules import RULES, BlockRule, Origin, Rule, make_rule, verify

STEPS, BLOCK, START = 3, 2, 0
Path = tuple[tuple[int, ...], tuple[int, ...], float]  # tokens, origins, probability


class Tabular(nn.Module):
    """A causal model by table: logits depend on the place, counted by its cache, and the token there."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(STEPS + 1, size, size, generator=generator)
        self.config = LlamaConfig(
            vocab_size=size,
            num_hidden_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            eos_token_id=None,
            bos_token_id=None,
        )
        self.head = nn.Embedding(size, 1)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **others: Any) -> SimpleNamespace:
        places = past_key_values.width + torch.arange(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[places, input_ids])

    def distribution(self, prefix: tuple[int, ...]) -> Tensor:
        return self.table[len(prefix), (START, *prefix)[-1]]


class Oracle:
    """Answers random choices along one path after another, until all have been walked."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.counts: list[int] = []
        self.probability = 1.0
        self.lossless = False
        self.together = False  # block verification: the last coin that falls is what counts
        self.exact = False  # a block draws two tokens: behind a rejection the first counts, else the second
        self.rejected = False
        self.drawn = 0
        self.asked_for_passes = 0

    def choose(self, chances: list[float]) -> int:
        possible = [place for place, chance in enumerate(chances) if chance > 0]
        step = len(self.counts)
        if step == len(self.script):
            self.script.append(0)
        self.counts.append(len(possible))
        chosen = possible[self.script[step]]
        self.probability *= chances[chosen]
        return chosen

    def paths(self, run: Callable[[], tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterator[Path]:
        while True:
            self.counts, self.probability = [], 1.0
            tokens, origins = run()
            yield tokens, origins, self.probability
            while self.script and self.script[-1] + 1 == self.counts[len(self.script) - 1]:
                self.script.pop()
            if not self.script:
                return
            self.script[-1] += 1


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """Stands in for the random numbers of the loop."""
    asked = Oracle()

    def token(weights: Tensor, uniform: Any) -> Tensor:
        assert len(weights) == 1
        return torch.tensor([asked.choose((weights[0].double() / weights[0].double().sum()).tolist())])

    def following(weights: Tensor, uniform: Any) -> Tensor:
        asked.drawn += 1
        counts = not asked.exact or (asked.drawn == 1) == asked.rejected
        return token(weights, uniform) if counts else weights.argmax(dim=-1)

    def numbers(rows: int, drafts: int, generator: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        asked.rejected, asked.drawn = False, 0  # a block begins
        return torch.zeros(rows, drafts), torch.zeros(rows)

    def drafted(
        self: SamplingDistributions, decision: Tensor, sampling: Any, number: Any, out: Any = None
    ) -> Tensor:
        drawn = token(torch.softmax(decision / self.temperature, dim=-1), None)
        if out is not None:
            out[:, 0] = drawn
        return drawn

    def accepts(pi: Tensor, q: Tensor, uniform: Any, kept: Tensor | None = None) -> Tensor:
        asked.asked_for_passes += int(pi.numel() > 0)  # no limit is looked at where nothing was drafted
        if asked.lossless and pi.numel() and asked.asked_for_passes % 2:
            # Under a limit of 0 the rule's own ratio, asked for first, is never in force.
            return torch.ones_like(pi, dtype=torch.bool)
        ratio = (pi / q).clamp(max=1.0)
        ratio = ratio if kept is None else torch.where(kept, torch.ones_like(ratio), ratio)
        if asked.together:
            coins = [False] * ratio.shape[1]
            for place in reversed(range(len(coins))):
                coins[place] = asked.choose([1.0 - float(ratio[0, place]), float(ratio[0, place])]) == 1
                if coins[place]:
                    break
            asked.rejected = coins[-1:] == [False]
            return torch.tensor([coins], dtype=torch.bool).reshape(1, -1)
        stands, found = True, []
        for chance in ratio[0].tolist():
            stands = stands and asked.choose([1.0 - chance, chance]) == 1
            found.append(stands)
        asked.rejected = not stands
        return torch.tensor([found], dtype=torch.bool).reshape(1, -1)

    monkeypatch.setattr(verify, "uniforms", numbers)
    monkeypatch.setattr(verify, "draw", following)
    monkeypatch.setattr(verify, "accepts", accepts)
    monkeypatch.setattr(SamplingDistributions, "draw", drafted)
    return asked


class Head:
    """A head with a formula for weights."""

    stage = "verify"

    def __init__(self, *features: str) -> None:
        self.features = features

    def gap(self, summary: Any) -> Tensor:
        return summary["verifier_max"] - summary["verifier_at_drafter_argmax"] + 0.02

    def score(self, summary: Any) -> Tensor:
        return summary["verifier_logprob"].exp()


class EarlyHead:
    """The same at the draft stage."""

    stage, features = "draft", ("drafter_max",)

    def gap(self, summary: Any) -> Tensor:
        return 0.75 - summary["drafter_max"]

    def tv(self, summary: Any) -> Tensor:
        return 1.0 - summary["drafter_max"]


def rule_named(name: str) -> Rule:
    if name == "learned":
        return make_rule(name, head=Head("verifier_max", "verifier_at_drafter_argmax"), alpha=0.1)
    if name == "judge":
        return make_rule(name, head=Head("verifier_logprob"), threshold=0.4)
    if name == "token_gap":
        return make_rule(name, head=TokenCost(), alpha=0.1)
    if name == "csd":
        return make_rule(name, table=TABLE)
    if name == "fly":
        return make_rule(name, window=1)
    if name == "early":
        return make_rule("learned", head=EarlyHead(), alpha=0.1)
    return make_rule(name)


def enumerate_loop(
    oracle: Oracle, rule: Rule, size: int, **options: Any
) -> tuple[list[Path], Tabular, Tabular]:
    drafter, verifier = Tabular(size, 1), Tabular(size, 2)
    blocks = "execution" not in options and rule.drafts and not rule.is_lossless
    oracle.exact = blocks and options.get("bonus") == "exact"
    oracle.together = options.get("verification") == "block"
    config = GenerationConfig(max_length=1 + STEPS, do_sample=True, return_dict_in_generate=True)

    def run() -> tuple[tuple[int, ...], tuple[int, ...]]:
        output = cascade_generate(
            verifier, torch.tensor([[START]]), [], [], config, drafter, rule, BLOCK, **options
        )
        return tuple(output.sequences[0, 1:].tolist()), tuple(output.stats.origin[0].tolist())

    return list(oracle.paths(run)), drafter, verifier


def assert_follows(paths: list[Path], expected: Callable[[tuple[int, ...], bool], Tensor]) -> None:
    """Given every prefix, the next token follows ``expected(prefix, is_bonus)``."""
    assert sum(chance for _, _, chance in paths) == pytest.approx(1.0, abs=1e-6)
    groups: dict[tuple[tuple[int, ...], bool], Tensor] = {}
    for tokens, origins, chance in paths:
        for step, token in enumerate(tokens):
            key = tokens[:step], origins[step] == Origin.BONUS
            distribution = expected(*key)
            groups.setdefault(key, torch.zeros_like(distribution, dtype=torch.float64))[token] += chance
    for (prefix, is_bonus), mass in groups.items():
        torch.testing.assert_close(mass / mass.sum(), expected(prefix, is_bonus).double(), atol=3e-6, rtol=0)


TARGETED = [name for name, rule in RULES.items() if not issubclass(rule, BlockRule)]
CASES = [(name, 2) for name in (*TARGETED, "early")] + [("opt", 3), ("token_v3", 3)]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_drafts_follow_the_target_and_bonus_tokens_the_verifier(oracle: Oracle, name: str, size: int) -> None:
    rule = rule_named(name)
    paths, drafter, verifier = enumerate_loop(oracle, rule, size)

    def expected(prefix: tuple[int, ...], is_bonus: bool) -> Tensor:
        # What has no draft (the last place of a text) is a bonus too.
        q, p = drafter.distribution(prefix), verifier.distribution(prefix)
        return torch.softmax(p, dim=-1) if is_bonus else rule.target(q[None], p[None])[0]

    assert_follows(paths, expected)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_an_exact_bonus_gives_the_autoregressive_target_distribution(
    oracle: Oracle, name: str, size: int
) -> None:
    rule = rule_named(name)
    paths, drafter, verifier = enumerate_loop(oracle, rule, size, bonus="exact")

    def expected(prefix: tuple[int, ...], is_bonus: bool) -> Tensor:
        return rule.target(drafter.distribution(prefix)[None], verifier.distribution(prefix)[None])[0]

    assert_follows([(tokens, (0,) * STEPS, chance) for tokens, _, chance in paths], expected)


@pytest.mark.parametrize(
    "name", ["lossless", "opt", "token_v3", "lossy", "ears", "ensemble", "csd", "learned"]
)
def test_block_verification_gives_the_target_distribution_over_several_blocks(
    oracle: Oracle, name: str
) -> None:
    rule = rule_named(name)
    paths, drafter, verifier = enumerate_loop(oracle, rule, 2, bonus="exact", verification="block")

    def expected(prefix: tuple[int, ...], is_bonus: bool) -> Tensor:
        return rule.target(drafter.distribution(prefix)[None], verifier.distribution(prefix)[None])[0]

    assert_follows([(tokens, (0,) * STEPS, chance) for tokens, _, chance in paths], expected)


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        ("opt", "token"),
        ("chow", "token"),
        ("learned", "token"),
        ("early", "token"),
        ("chow", "lazy"),
        ("early", "lazy"),
    ],
)
def test_executions_without_blocks_follow_the_target(oracle: Oracle, name: str, execution: str) -> None:
    rule = rule_named(name)
    paths, drafter, verifier = enumerate_loop(oracle, rule, 2, execution=execution, bonus="exact")

    def expected(prefix: tuple[int, ...], is_bonus: bool) -> Tensor:
        return rule.target(drafter.distribution(prefix)[None], verifier.distribution(prefix)[None])[0]

    assert_follows([(tokens, (0,) * STEPS, chance) for tokens, _, chance in paths], expected)


@pytest.mark.parametrize("name", [*RULES, "early"])
def test_no_loss_allowed_is_the_verifier_s_distribution(oracle: Oracle, name: str) -> None:
    rule = rule_named(name)
    oracle.lossless = not rule.is_lossless  # a lossless rule is asked for one ratio
    paths, _, verifier = enumerate_loop(oracle, rule, 2, max_request_loss=0.0)
    assert_follows(paths, lambda prefix, is_bonus: torch.softmax(verifier.distribution(prefix), dim=-1))


def test_the_enumeration_would_notice_another_distribution(oracle: Oracle) -> None:
    paths, _, verifier = enumerate_loop(oracle, make_rule("opt", alpha=0.5), 3)
    with pytest.raises(AssertionError):
        assert_follows(paths, lambda prefix, is_bonus: torch.softmax(verifier.distribution(prefix), dim=-1))
