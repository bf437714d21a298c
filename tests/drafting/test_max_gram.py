"""What Max-Gram proposes, against a reference that searches and copies in the plainest way; its bigram table."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from drafting.test_suffixes import longest_match
from hypothesis import given
from hypothesis import strategies as st

from deferral_train.decoding.drafting import BigramTable, MaxGram
from deferral_train.errors import InputError

LETTERS = st.integers(0, 3)
TABLE = BigramTable(torch.tensor([2, 3, -1, 1]), "tokenizer")


def plain_proposal(text: list[int], count: int, latest: bool, least: int, bigrams: bool) -> list[int]:
    """Copy token by token from behind the match, over the end of the text into the copy; then bigrams."""
    match, grown = longest_match(text, latest), list(text)
    if match.length >= least:
        for step in range(count):
            token = grown[match.end + 1 + step]
            if token == -1:
                break
            grown.append(token)
    while bigrams and len(grown) < len(text) + count and grown and grown[-1] >= 0:
        token = int(TABLE.successor[grown[-1]])
        if token < 0:
            break
        grown.append(token)
    return grown[len(text) :]


@given(
    prompt=st.lists(LETTERS, max_size=12),
    pieces=st.lists(st.tuples(st.integers(0, 30), st.lists(LETTERS, max_size=8)), max_size=5),
    count=st.integers(0, 9),
    match=st.sampled_from(["earliest", "latest"]),
    least=st.integers(1, 3),
    bigrams=st.booleans(),
    separate=st.booleans(),
)
def test_proposals_are_those_of_the_plain_copy(
    prompt, pieces, count, match, least, bigrams, separate
) -> None:
    settings = MaxGram(match, least, TABLE if bigrams else None)
    text, generated = settings.read(prompt, separate), []
    for size, tokens in pieces:
        generated = generated[:size] + tokens
        text.follow(len(generated) - len(tokens), tokens)
        whole = [*prompt, *([-1] if separate else []), *generated]
        assert text.index.text == whole
        assert text.propose(count) == plain_proposal(whole, count, match == "latest", least, bigrams)


def test_a_loop_is_copied_round_and_round() -> None:
    assert MaxGram().read([5, 1, 2, 3, 1]).propose(7) == [2, 3, 1, 2, 3, 1, 2]


def test_nothing_known_proposes_nothing() -> None:
    assert MaxGram().read([]).propose(4) == []
    assert MaxGram().read([1, 2, 3]).propose(4) == []


def test_the_end_of_an_encoders_prompt_is_not_copied_over() -> None:
    text = MaxGram().read([7, 8, 9], separate=True)
    text.follow(0, [7])
    assert text.propose(5) == [8, 9]


@given(st.lists(st.lists(LETTERS, max_size=20), max_size=5))
def test_bigrams_are_the_most_frequent_successors(texts: list[list[int]]) -> None:
    table = BigramTable.learn(texts, 4, "t")
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    for first in range(4):
        following = [(-pairs[first, second], second) for second in range(4) if pairs[first, second]]
        assert table[first] == (min(following)[1] if following else -1)
    assert table[-1] == table[4] == -1


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "bigrams.safetensors")
    back = BigramTable.load(tmp_path / "bigrams.safetensors")
    assert torch.equal(back.successor, TABLE.successor)
    assert back.tokenizer == "tokenizer"
    back.check("tokenizer", 4)
    back.check(None, 4)


def test_what_is_no_table_of_this_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"learned with tokenizer tokenizer.*learn it again"):
        TABLE.check("another", 4)
    with pytest.raises(InputError, match="4 ids, the models 5"):
        TABLE.check("tokenizer", 5)
    with pytest.raises(InputError, match="no file"):
        BigramTable.load(tmp_path / "absent")
    (tmp_path / "text").write_text("successor")
    with pytest.raises(InputError, match="not a safetensors file"):
        BigramTable.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, str(tmp_path / "model"))
    with pytest.raises(InputError, match="not a bigram table"):
        BigramTable.load(tmp_path / "model")
    with pytest.raises(InputError, match="outside the vocabulary"):
        BigramTable(torch.tensor([0, 2]), "t")
    with pytest.raises(InputError, match="outside the vocabulary"):
        BigramTable.learn([[0, 4]], 4, "t")


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(InputError, match="match is 'first'"):
        MaxGram("first")
    with pytest.raises(InputError, match="least is 0"):
        MaxGram(least=0)
