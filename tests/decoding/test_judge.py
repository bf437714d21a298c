"""Accept-or-exact with a head on the drafted token's own state: emitted distribution, greedy text, ends, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of
from scipy.stats import chi2
from tiny_models import save_tiny_pair
from torch import Tensor

from deferral_train.commands import decode as decode_command
from deferral_train.decoding.stopping import AcceptanceStop, HeadStop
from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead, GapHead, JudgeHead
from deferral_train.heads.export import set_operating_point
from deferral_train.heads.rules import learned_rule, rule_from_spec
from deferral_train.rules import Rule, make_rule
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.emission import acceptance, residual
from deferral_train.rules.summary import Summary

WIDTH, BLOCK, ROOM = 32, 4, 12


@cache
def head(seed: int = 0) -> JudgeHead:
    """A linear head with weights that approve of about half."""
    made = JudgeHead(["verifier_hidden_at_token"], widths={"verifier_hidden_at_token": WIDTH})
    with torch.no_grad():
        weights = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
        made.body[0].weight.copy_(weights)
    return made.eval().requires_grad_(False)


def judge(threshold: float = 0.5) -> Rule:
    return make_rule("judge", head=head(), threshold=threshold)


@torch.no_grad()
def run(model: Any, prompt: list[int], text: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and states behind the prompt and behind every token of the text, from one plain pass."""
    if model.config.is_encoder_decoder:
        ids = torch.tensor([[model.config.decoder_start_token_id, *text]])
        output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids, output_hidden_states=True)
        return output.logits[0], output.decoder_hidden_states[-1][0]
    output = model(input_ids=torch.tensor([[*prompt, *text]]), output_hidden_states=True)
    return output.logits[0, len(prompt) - 1 :], output.hidden_states[-1][0, len(prompt) - 1 :]


def score(states: Tensor) -> Tensor:
    unread = torch.zeros(states.shape[:-1], dtype=torch.long)  # the argmaxes gate the gap, not the score
    fields = {"drafter_argmax": unread, "verifier_argmax": unread}
    return head().score(Summary({"verifier_hidden_at_token": states, **fields}))


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_greedy_text_is_that_of_a_plain_walk(kind: str) -> None:
    drafter, verifier, _ = pair_of(kind)
    inputs = prompts_for(kind)
    output = generate(
        drafter, verifier, inputs, judge(), max_new_tokens=ROOM, num_draft_tokens=BLOCK, eos_token_id=None
    )
    approved = 0
    for row in range(4):
        prompt = row_of(kind, inputs, row)["input_ids"][0].tolist()
        text, passes = plain_walk(drafter, verifier, prompt)
        assert emitted(output, row) == text
        approved += passes
    assert approved > 4  # tokens that the exact check alone would have replaced
    assert approved == int(output.stats.kept.sum())


def plain_walk(drafter: Any, verifier: Any, prompt: list[int]) -> tuple[list[int], int]:
    text: list[int] = []
    approvals = 0
    while len(text) < ROOM:
        draft: list[int] = []
        for _ in range(min(BLOCK, ROOM - len(text) - 1)):
            draft.append(int(run(drafter, prompt, [*text, *draft])[0][-1].argmax()))
        logits, states = run(verifier, prompt, [*text, *draft])
        start = len(text)
        for place, token in enumerate(draft):
            approves = float(score(states[start + place + 1])) > 0.5
            favourite = int(logits[start + place].argmax())
            if not approves and token != favourite:
                break
            approvals += approves and token != favourite
            text.append(token)
        text.append(int(logits[len(text)].argmax()))
    return text, approvals


def own_states(verifier: Any, prompt: list[int], size: int) -> Tensor:
    """The verifier's state at each token that might follow the prompt, [V, D]."""
    return torch.stack([run(verifier, prompt, [token])[1][-1] for token in range(size)])


def accept_or_exact(q: Tensor, p: Tensor, approved: Tensor) -> Tensor:
    """q J + min(q, p) (1 - J) + R norm(max(0, p - q)), R the mass of rejected drafts."""
    stands = torch.where(approved, q, torch.minimum(q, p))
    excess = (p - q).clamp(min=0)
    return stands + (q - stands).sum() * excess / excess.sum()


def test_the_emitted_distribution_by_enumeration_and_in_the_loop() -> None:
    drafter, verifier, _ = pair_of("llama")
    prompt = [5, 9, 21, 7]
    logits = [run(model, prompt, [])[0][-1].double() for model in (drafter, verifier)]
    q, p = (one.softmax(-1) for one in logits)
    states = own_states(verifier, prompt, len(q))
    approved = score(states) > 0.5
    expected = accept_or_exact(q, p, approved)
    assert float((expected - p).abs().sum()) > 0.05  # not the verifier's distribution

    rule, found = judge(), torch.zeros_like(q)
    distributions = Distributions.of(logits[0][None], logits[1][None], 1.0)
    for token in range(len(q)):  # every draft, its check and its correction, added up in float64
        context = Summary({"verifier_hidden_at_token": states[token][None]})
        distribution = rule.step_distribution(
            distributions, rule.read(distributions, torch.tensor([token]), context), torch.tensor([token])
        )[0]
        passes = acceptance(distribution[token], q[token])
        found[token] += q[token] * passes
        found += q[token] * (1 - passes) * residual(distribution, q)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)

    count = 6000
    output = generate(
        drafter, verifier, {"input_ids": torch.tensor([prompt])}, rule, max_new_tokens=2, num_draft_tokens=1,
        do_sample=True, top_k=0, num_return_sequences=count, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    drawn = torch.bincount(output.sequences[:, len(prompt)], minlength=len(q)).double()
    large = expected * count >= 5
    cells = torch.cat([drawn[large], drawn[~large].sum()[None]])
    hoped = count * torch.cat([expected[large], expected[~large].sum()[None]])
    statistic = float(((cells - hoped) ** 2 / hoped.clamp_min(1e-9)).sum())
    assert chi2.sf(statistic, len(cells) - 1) > 1e-6  # fails by chance once in a million seeds


@pytest.mark.parametrize("sampled", [False, True])
def test_threshold_one_is_lossless_token_by_token(sampled: bool) -> None:
    drafter, verifier, _ = pair_of("t5")
    options = {"do_sample": sampled, "top_k": 0} if sampled else {}
    texts = [
        generate(
            drafter, verifier, prompts_for("t5"), rule, generator=torch.Generator().manual_seed(1), **options
        ).sequences
        for rule in ("lossless", judge(1.0))
    ]
    assert torch.equal(*texts)


def test_a_saved_head_decodes_by_its_name_and_is_refused_elsewhere(tmp_path: Path, capsys: Any) -> None:
    drafter, verifier = save_tiny_pair("t5", tmp_path / "pair")
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\nw4 w5\n")
    made = JudgeHead(
        ["verifier_hidden_at_token", "verifier_logprob"], widths={"verifier_hidden_at_token": WIDTH}
    )
    made.metadata = {"threshold": 0.4}
    made.save_pretrained(tmp_path / "head")
    again = DeferralHead.from_pretrained(tmp_path / "head")
    assert isinstance(again, JudgeHead)
    assert again.config == made.config
    assert rule_from_spec(f"judge:head={tmp_path / 'head'}").dial_value == 0.4
    set_operating_point(tmp_path / "head", 0.45)
    assert rule_from_spec(f"judge:head={tmp_path / 'head'}").dial_value == 0.45
    rules = ["lossless", f"judge:head={tmp_path / 'head'},threshold=1.0", f"judge:head={tmp_path / 'head'}"]
    arguments: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 2, "out": str(tmp_path / "out")}
    prompts = str(tmp_path / "prompts.txt")
    config = decode_command.DecodeSettings(str(drafter), str(verifier), prompts, rules=rules, **arguments)
    assert decode_command.run(config) == 0
    assert "judge" in capsys.readouterr().out
    made.metadata["pair"] = {"tokenizer": "another", "vocab_size": 40}
    made.save_pretrained(tmp_path / "head")
    other = replace(config, rules=rules[1:2], out=str(tmp_path / "other"))
    with pytest.raises(InputError, match="made for another vocabulary"):
        decode_command.run(other)


def draft_head() -> JudgeHead:
    made = JudgeHead(["drafter_max:logit"], stage="draft")
    with torch.no_grad():
        made.body[0].weight.fill_(0.5)
    return made.eval()


def test_acceptance_stop_ends_a_block_at_the_product_of_its_chances() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = row_of("llama", prompts_for("llama"), 0)
    seen: list[list[float]] = []

    class Watched(AcceptanceStop):
        def stops(self, step: Any) -> Tensor:
            stopped = super().stops(step)
            if step.place == 0:
                seen.append([])
            seen[-1].append(float(self.head.score(step.summary(self.needs))))
            assert bool(stopped) == bool(1 - torch.tensor(seen[-1]).double().prod() > 0.6)
            return stopped

    stop = Watched(draft_head(), 0.6)
    with_stop = generate(
        drafter, verifier, inputs, "lossless", stop=stop, num_draft_tokens=8, eos_token_id=None
    )
    without = generate(drafter, verifier, inputs, "lossless", num_draft_tokens=8, eos_token_id=None)
    assert torch.equal(with_stop.sequences, without.sequences)
    assert len({len(block) for block in seen}) > 1
    assert AcceptanceStop(draft_head()).threshold == 0.7


def test_heads_of_the_wrong_stage_or_kind_are_one_line() -> None:
    gap = GapHead(["drafter_max"], stage="draft", body="linear")
    states = JudgeHead(["verifier_hidden_at_token"], widths={"verifier_hidden_at_token": 4})
    for make, message in (
        (lambda: make_rule("judge", head=draft_head()), "head has stage 'draft' and predicts acceptance"),
        (lambda: make_rule("judge", head=gap), "pass an object with .features and .score"),
        (lambda: learned_rule(head(), 0.1), "a judge head answers rule judge"),
        (lambda: AcceptanceStop(head()), "stop head has stage 'verify'"),
        (lambda: AcceptanceStop(gap), "a gap head predicts no acceptance"),
        (lambda: AcceptanceStop(draft_head(), 1.5), "stop threshold is 1.5"),
        (lambda: HeadStop(draft_head(), 0.1), "a judge head knows no gap"),
        (lambda: JudgeHead(["drafter_max"], loss="log"), "a judge head needs loss='zero_one'"),
        (lambda: JudgeHead(["verifier_max"], stage="draft"), "a draft-stage head cannot read verifier_max"),
        (lambda: make_rule("judge", head=states).target(torch.zeros(5), torch.zeros(5)), "context lacks"),
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    drafter, verifier, _ = pair_of("t5")
    with pytest.raises(InputError, match="reads verifier_hidden_at_token"):
        generate(drafter, verifier, prompts_for("t5"), judge(), bonus="exact")
