"""Blocks laid as serving engines do: the verifier gives the first token, the last block runs over the limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of

from deferral_train.decoding import cascade_generate
from deferral_train.decoding.drafting import GivenDraft
from deferral_train.errors import InputError
from deferral_train.rules import Origin, make_rule

DRAFTS, TOKENS, END = 4, 15, 1


def distributions(model: Any, inputs: dict[str, torch.Tensor], text: list[int], kind: str) -> torch.Tensor:
    """Next-token probabilities [V] in float64, without a cache."""
    said = torch.tensor([text], dtype=torch.long)
    if kind == "t5":
        start = torch.cat([torch.zeros(1, 1, dtype=torch.long), said], dim=1)
        logits = model(**inputs, decoder_input_ids=start).logits
    else:
        logits = model(input_ids=torch.cat([inputs["input_ids"], said], dim=1)).logits
    return logits[0, -1].double().softmax(-1)


def served(
    kind: str, drafter: Any, verifier: Any, inputs: dict[str, torch.Tensor], alpha: float
) -> list[int]:
    """The text of OPT laid as an engine does, token by token from the formula: defer iff max q < max p - alpha TV."""
    text = [int(distributions(verifier, inputs, [], kind).argmax())]
    while len(text) < TOKENS and END not in text:
        draft: list[int] = []
        for _ in range(DRAFTS):
            q = distributions(drafter, inputs, text + draft, kind)
            draft.append(int(q.argmax()))
        for place, token in enumerate([*draft, None]):
            q, p = (distributions(model, inputs, text, kind) for model in (drafter, verifier))
            distance = float(
                q.argmax() != p.argmax()
            )  # of the point masses that greedy tokens are drawn from
            defer = q.max() < p.max() - alpha * distance
            text.append(int(p.argmax()) if token is None or defer else token)
            if place < DRAFTS and text[-1] != draft[place]:
                break
    text = text[:TOKENS]
    return text[: text.index(END) + 1] if END in text else text


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_texts_follow_the_formula_with_the_engines_blocks(kind: str, alpha: float) -> None:
    drafter, verifier, _ = pair_of(kind)
    inputs = prompts_for(kind)
    rule = make_rule("opt", alpha=alpha)
    options = {"num_draft_tokens": DRAFTS, "max_new_tokens": TOKENS, "eos_token_id": END}
    laid = generate(drafter, verifier, inputs, rule, blocks="served", **options)
    texts = [emitted(laid, row) for row in range(4)]
    assert texts == [served(kind, drafter, verifier, row_of(kind, inputs, row), alpha) for row in range(4)]
    tight = generate(drafter, verifier, inputs, rule, **options)
    assert texts != [emitted(tight, row) for row in range(4)]  # the blocks do make a difference
    stats = laid.stats
    assert (stats.origin[:, 0] == Origin.BONUS).all()
    assert torch.equal(
        stats.drafted, stats.kept + stats.accepted + stats.unverified + stats.rejected + stats.discarded
    )


def test_lossless_text_and_the_room_of_the_model_stay() -> None:
    """Also where the last block runs over the verifier's context, of learned positions."""
    drafter, verifier, _ = pair_of("gpt2")
    inputs = row_of("gpt2", prompts_for("gpt2"), 0)
    room = verifier.config.n_positions - inputs["input_ids"].shape[1]
    options = {"max_new_tokens": room, "eos_token_id": None}
    plain = verifier.generate(**inputs, do_sample=False, **options)
    for name in ("lossless", "verifier_only"):
        laid = generate(drafter, verifier, inputs, name, num_draft_tokens=7, blocks="served", **options)
        assert laid.sequences.tolist() == plain.tolist()
        assert int(laid.stats.emitted[0]) == room


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": "loose"}, "blocks is 'loose'; use one of tight, served"),
        ({"blocks": "served", "execution": "token"}, "blocks='served' are one drafter's"),
        ({"blocks": "served", "bonus": "exact"}, "leave the other out, or use 'tight'"),
    ],
)
def test_what_has_no_such_blocks_is_refused(settings: dict[str, str], message: str) -> None:
    drafter, verifier, _ = pair_of("llama")
    with pytest.raises(InputError, match=message):
        generate(drafter, verifier, prompts_for("llama"), "chow", **settings)


def test_a_given_draft_has_no_such_blocks() -> None:
    _, verifier, _ = pair_of("llama")
    inputs = row_of("llama", prompts_for("llama"), 0)
    with pytest.raises(InputError, match="blocks='served' are one drafter's"):
        verifier.generate(
            **inputs, do_sample=False, max_new_tokens=4, custom_generate=cascade_generate, blocks="served",
            drafter=GivenDraft([[5, 6, 7]]), rule="lossless",
        )  # fmt: skip
