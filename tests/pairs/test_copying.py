"""A model that was never trained goes on with what it has read before, where two tokens are needed to know how."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.pairs.scratch.models import new_model
from deferral_train.pairs.scratch.train_config import ModelSize, PairConfig, PairText

# Of the default settings, from before there was the option.
PLAIN = "5c6ffa1972d73b3a"
CONTEXT, ROWS, TEXT, GAP = 96, 32, 24, 10


class Tokens:
    """A tokenizer as far as a fresh model asks for one."""

    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return 1000


def fresh(copies: bool, seed: int) -> torch.nn.Module:
    size = ModelSize(layers=4, width=128, heads=2, feed_forward=192, copies=copies)
    config = PairConfig(text=PairText(answers=True), context=CONTEXT, verifier=size, seed=seed)
    return new_model(config, "verifier", Tokens()).eval()


def texts(kinds: int, seed: int) -> Tensor:
    """[ROWS, TEXT] random tokens, so many different ones a row."""
    draw = torch.Generator().manual_seed(seed)
    alphabets = torch.stack([torch.randperm(998, generator=draw)[:kinds] + 2 for _ in range(ROWS)])
    return alphabets.gather(1, torch.randint(kinds, (ROWS, TEXT), generator=draw))


@torch.inference_mode()
def continued(model: torch.nn.Module, text: Tensor) -> Tensor:
    """[ROWS, TEXT - 2] likeliest tokens behind each two of ``text``, read again behind something else."""
    between = torch.randint(2, 1000, (ROWS, GAP), generator=torch.Generator().manual_seed(7))
    logits = model(torch.cat([text, between, text], 1)).logits
    return logits[:, TEXT + GAP + 1 : -1].argmax(-1)


def one_successor(text: Tensor, back: int) -> Tensor:
    """[ROWS, TEXT - 2] True where the last ``back`` tokens, wherever they stand in the text, have one successor."""
    found = torch.zeros(ROWS, TEXT - 2, dtype=torch.bool)
    for row, tokens in enumerate(text.tolist()):
        for end in range(2, TEXT):
            before = tokens[end - back : end]
            after = {tokens[i] for i in range(back, TEXT) if tokens[i - back : i] == before}
            found[row, end - 2] = len(after) == 1
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_fresh_model_repeats_what_it_read(seed: int) -> None:
    text = texts(500, seed)
    known = one_successor(text, 1)
    assert known.float().mean() > 0.9
    right = continued(fresh(True, seed), text) == text[:, 2:]
    assert right[known].float().mean() > 0.9
    right = continued(fresh(False, seed), text) == text[:, 2:]
    assert right[known].float().mean() < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_tokens_decide_where_one_has_several_successors(seed: int) -> None:
    """One token alone leaves two or more candidates here, and the best guess among them is right half of the time."""
    text = texts(8, seed)
    needs_two = one_successor(text, 2) & ~one_successor(text, 1)
    assert needs_two.sum() > 200
    right = continued(fresh(True, seed), text) == text[:, 2:]
    assert right[needs_two].float().mean() > 0.75


def test_the_start_is_a_function_of_the_seed() -> None:
    first, again, other = (fresh(True, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("shape", [{"layers": 1}, {"heads": 4}])
def test_a_shape_without_room_for_the_circuit_is_refused(shape: dict[str, int]) -> None:
    sizes = {"layers": 4, "width": 128, "heads": 2, "feed_forward": 192} | shape
    with pytest.raises(InputError, match="copies: needs heads=2 and at least 2 layers"):
        ModelSize(**sizes, copies=True)


def test_an_encoder_and_decoder_cannot_start_so() -> None:
    size = ModelSize(2, 32, 2, 64, copies=True)
    with pytest.raises(InputError, match=r"drafter\.copies is for kind: llama"):
        PairConfig(kind="t5", text=PairText(files=("a",), targets=("b",)), drafter=size)


def test_settings_without_it_keep_their_hash() -> None:
    """Pairs that were trained before there was the option are found again."""
    assert PairConfig().outcome_hash() == PLAIN
    assert (
        PairConfig(verifier=ModelSize(8, 144, 2, 384, copies=True)).outcome_hash()
        != PairConfig(verifier=ModelSize(8, 144, 2, 384)).outcome_hash()
    )
