"""Forms (a) and (b) above temperature 0 with exact gaps: what they lose adds up, and the loop samples what they say.

Every text of two tokens of a tiny pair is enumerated, so that the gaps are exact. J is the expected score of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deferral_train.decoding import Pair
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules.learned import LearnedRule
from deferral_train.rules.summary import Summary
from deferral_train.rules.token_gap import TokenGapRule

from .conftest import tiny_pair
from .test_sequence import next_logits, text_of

PROMPT = Prompt("a", "w1 w2 w3", "w4 w9 w7")
PAIR = tiny_pair("llama")
SIZE = 40


@dataclass(frozen=True)
class Tree:
    """Every text of at most two tokens behind a prompt; a first token that ends the text has no children.

    Attributes:
        logits: of both models at the root [V], and behind every first token [V, V].
        score: of every text [V, V], the same along a row whose first token ends it.
        ends: first tokens that end the text, [V].
    """

    logits: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    score: Tensor
    ends: Tensor

    @property
    def worth(self) -> Tensor:
        """Expected score behind each first token when the verifier goes on, [V]."""
        return (self.logits[1][1].softmax(-1) * self.score).sum(-1)

    def gaps(self, depth: int) -> Tensor:
        """E_{y~p} Q(y) - Q(v) at the root [V], or behind each first token [V, V]."""
        worth = self.worth if depth == 0 else self.score
        p = self.logits[depth][1].softmax(-1)
        return (p * worth).sum(-1, keepdim=True) - worth


@cache
def tree() -> Tree:
    ids = encode_prompts(PAIR.tokenizer, [PROMPT], is_encoder_decoder=False).kept[0].input_ids
    models = (PAIR.drafter, PAIR.verifier)
    root = [next_logits(model, ids, []).double() for model in models]
    below = [torch.stack([next_logits(model, ids, [v]) for v in range(SIZE)]).double() for model in models]
    ends = torch.tensor([v in PAIR.eos_ids for v in range(SIZE)])
    texts = [[v] if ends[v] else [v, y] for v in range(SIZE) for y in range(SIZE)]
    scores = make_scorers(["chrf1"])["chrf1"](
        [text_of(PAIR, text) for text in texts], [PROMPT.reference] * len(texts)
    )
    return Tree(
        ((root[0], root[1]), (below[0], below[1])), torch.tensor(np.array(scores)).reshape(SIZE, SIZE), ends
    )


class Known:
    """Exact gaps as an estimator: of the position (form a) or of each token (form b), by place and token before."""

    stage = "verify"

    def __init__(self, form: str) -> None:
        self.form = form
        context = ("position", "previous_token_1")
        self.features = (
            context if form == "position" else (*context, "token", "drafter_logprob", "verifier_logprob")
        )

    def token_gap(self, tokens: Any, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        first = (summary["position"] == 0).unsqueeze(-1)
        behind = tree().gaps(1)[summary["previous_token_1"].long().clamp_min(0)]
        found = torch.where(first, tree().gaps(0).expand(behind.shape), behind).to(q)
        return found if tokens is None else found.gather(-1, tokens.long().clamp_min(0))

    def gap(self, summary: Summary) -> Tensor:
        if self.form == "token":
            names = ("token", "drafter_logprob", "verifier_logprob")
            token, *logs = (summary[name].unsqueeze(-1) for name in names)
            return self.token_gap(token, logs[0], logs[1], summary)[..., 0]
        q = [tree().logits[depth][0].softmax(-1) for depth in (0, 1)]
        of = [(own * tree().gaps(depth)).sum(-1) for depth, own in enumerate(q)]
        return torch.where(
            summary["position"] == 0, of[0], of[1][summary["previous_token_1"].long().clamp_min(0)]
        )


def rule_of(form: str, alpha: float) -> Any:
    if form == "position":
        return LearnedRule(head=Known(form), alpha=alpha)
    return TokenGapRule(head=Known(form), alpha=alpha, priced=form == "priced")


def targets(rule: Any) -> tuple[Tensor, Tensor]:
    """pi at the root [V] and behind every first token [V, V]."""
    found = []
    for depth, tokens in enumerate((torch.tensor(-1), torch.arange(SIZE))):
        context = Summary({"position": torch.full_like(tokens, depth), "previous_token_1": tokens})
        found.append(rule.target(*tree().logits[depth], context=context))
    return found[0], found[1]


def expected_score(first: Tensor, second: Tensor) -> float:
    return float((first[:, None] * second * tree().score).sum())


@pytest.mark.parametrize("form", ["position", "token", "priced"])
@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.2])
def test_what_a_rule_loses_is_the_sum_of_its_gaps(form: str, alpha: float) -> None:
    at = tree()
    q, p = (tuple(at.logits[depth][role].softmax(-1) for depth in (0, 1)) for role in (0, 1))
    rule = rule_of("token" if form == "priced" else form, alpha)
    if form == "priced":
        rule = TokenGapRule(head=Known("token"), alpha=alpha, priced=True)
    pi = targets(rule)
    lost = expected_score(*p) - expected_score(*pi)
    gaps = at.gaps(0), at.gaps(1)
    of_root = float((pi[0] * gaps[0]).sum())
    of_rest = float((pi[0] * ~at.ends * (pi[1] * gaps[1]).sum(-1)).sum())
    assert lost == pytest.approx(of_root + of_rest, abs=1e-6)
    # Only kept tokens lose: the verifier's own token has gap 0 on average.
    assert float((p[0] * gaps[0]).sum()) == pytest.approx(0, abs=1e-9)
    if form == "position":
        stays = bool(torch.equal(pi[0], q[0].to(pi[0])))
        assert of_root == pytest.approx(float((q[0] * gaps[0]).sum()) if stays else 0, abs=1e-6)
        assert stays == (float((q[0] * gaps[0]).sum()) <= alpha * float((p[0] - q[0]).clamp(min=0).sum()))
    elif form == "token":
        kept = gaps[0] <= alpha * (1 - p[0] / q[0]).clamp(min=0)
        assert 0 < int(kept.sum()) < SIZE
        assert torch.allclose(pi[0], q[0] * kept + (q[0] * ~kept).sum() * p[0])
        assert of_root == pytest.approx(float((q[0] * gaps[0])[kept].sum()), abs=1e-6)
    if alpha == 0:  # nothing is kept that loses
        assert lost <= 1e-9
    other = targets(rule.with_dial(alpha + 0.3))
    rejected = [float((own - target[0]).clamp(min=0).sum()) for own, target in ((q[0], pi), (q[0], other))]
    assert rejected[1] <= rejected[0] + 1e-12


@pytest.mark.parametrize("form", ["position", "token"])
def test_the_loop_samples_texts_of_the_stated_score(form: str) -> None:
    """1,200 texts; with two tokens at most the second is the verifier's own, so that J = sum_v pi(v) worth(v)."""
    rule = rule_of(form, 0.05)
    stated = float((targets(rule)[0] * tree().worth).sum())
    count = 1200
    found = Pair(PAIR).generate(
        [Prompt(f"a{n}", PROMPT.prompt, PROMPT.reference) for n in range(count)],
        rule, temperature=1.0, max_new_tokens=2, num_draft_tokens=3, batch_size=300, seed=5,
    )  # fmt: skip
    scores = make_scorers(["chrf1"])["chrf1"](found.texts, [PROMPT.reference] * count)
    error = float(np.std(scores)) / count**0.5
    assert abs(float(np.mean(scores)) - stated) < 4.5 * error
    assert error > 0
