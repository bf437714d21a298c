"""Replaying texts that are there gives the verifier calls of real decoding, prompt for prompt, under any plan."""

from __future__ import annotations

import pytest
import torch
from decoding.helpers import emitted, generate, pair_of, prompts_for, row_of

from deferral_train.decoding.drafting import DraftCascade, MaxGram, Plan
from deferral_train.decoding.drafting.replay import UNKNOWN, Path, fit_ending, replay
from deferral_train.errors import InputError

TOKENS, EOS = 14, (1,)
PLANS = {
    "max_gram": ([[5]], 0),
    "plain": ([[4, 0], [0, 0]], 1),
    "vertical": ([[4, 0], [0, 5]], 1),
    "tail": ([[2, 6], [0, 3]], 1),
    "horizontal": ([[2, 2, 0], [0, 0, 0], [0, 0, 0]], 2),
    "all": ([[3, 5, 2], [0, 1, 3], [0, 0, 5]], 2),
}


def drafters(kind: str) -> list:
    return [pair_of(kind, how)[0] for how in ("sometimes", "never")]


@torch.inference_mode()
def paths_of(kind: str, rows: int = 4) -> list[Path]:
    """The verifier's own texts, and the drafters' likeliest tokens along them."""
    inputs, verifier = prompts_for(kind, rows=rows), pair_of(kind)[1]
    plain = generate(drafters(kind)[0], verifier, inputs, "lossless", max_new_tokens=TOKENS)
    found = []
    for row in range(rows):
        one, tokens, guesses = row_of(kind, inputs, row), emitted(plain, row), []
        prompt = one["input_ids"][0][one["attention_mask"][0].bool()]
        for model in drafters(kind):
            if kind == "t5":
                written = torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]])
                logits = model(input_ids=prompt[None], decoder_input_ids=written).logits[0]
            else:
                ids = torch.cat([prompt, torch.tensor(tokens[:-1], dtype=torch.long)])
                logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 :]
            guesses.append(logits.argmax(dim=-1).tolist())
        stands = [[a == b for a, b in zip(guess, tokens)] for guess in guesses]
        found.append(Path(prompt.tolist(), tokens, guesses, stands, TOKENS, separate=kind == "t5"))
    return found


@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_calls_are_those_of_decoding(kind: str, name: str) -> None:
    (k, count), inputs = PLANS[name], prompts_for(kind, rows=4)
    plan = Plan(k, max_gram=MaxGram())
    cascade = DraftCascade(drafters(kind)[:count], plan)
    counted = generate(cascade, pair_of(kind)[1], inputs, "lossless", max_new_tokens=TOKENS)
    work = [replay(plan, path, EOS) for path in paths_of(kind)]
    assert [one.calls for one in work] == counted.stats.verifier_calls.tolist()
    assert [one.tokens for one in work] == counted.stats.emitted.tolist()
    for one in work:
        assert sum(one.widths[0].values()) == one.calls
        assert tuple(sum(widths.values()) for widths in one.widths[1:]) == one.passes


def test_passes_and_widths_by_hand() -> None:
    # Five tokens; the drafter is wrong at the third; Max-Gram copies nothing from an empty prompt.
    path = Path([], [5, 6, 7, 8, 9], [[5, 6, UNKNOWN, 8, 9]], [[True, True, False, True, True]], limit=9)
    work = replay(Plan([[3, 0], [0, 0]], max_gram=None), path)
    # 5 6 x | 7 resampled; then 8 9 and the draft ends with the text.
    assert (work.tokens, work.calls, work.passes) == (5, 2, (5,))
    assert dict(work.widths[0]) == {4: 1, 3: 1}
    # The start, 5, 6 one by one; then 7 alone (the verifier's own) and 8.
    assert dict(work.widths[1]) == {1: 5}
    loop = Path([1, 2, 3, 1, 2], [3, 1, 2, 3, 1], [], [], limit=5)
    copied = replay(Plan([[10]]), loop)
    assert (copied.calls, dict(copied.widths[0])) == (1, {5: 1})


def test_the_chance_of_ending_behind_a_wrong_token_is_found_again() -> None:
    right, text = [place % 3 != 0 for place in range(40)], list(range(10, 50))
    guess = [token if ok else UNKNOWN for token, ok in zip(text, right)]
    # Another first token is another stream of chances.
    paths = [Path([], [first, *text[1:]], [guess], [right], 60) for first in range(60)]
    plan = Plan([[6, 0], [0, 0]], max_gram=None)
    passes = sum(replay(plan, path, (), (0.3,)).passes[0] for path in paths)
    assert passes < sum(replay(plan, path).passes[0] for path in paths)
    assert fit_ending(plan, paths, (), passes) == pytest.approx(0.3, abs=0.02)


def test_what_texts_cannot_tell_is_refused() -> None:
    path = Path([], [3], [], [], limit=4)
    with pytest.raises(InputError, match="lenience is 2"):
        replay(Plan([[2]], lenience=2.0), path)
    with pytest.raises(InputError, match="1 drafter"):
        replay(Plan([[2, 0], [0, 0]]), path)
