"""The suffix index against comparing every place of the text, through any mix of growing and shrinking."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferral_train.decoding.drafting.suffixes import Match, SuffixIndex


def longest_match(text: Sequence[int], latest: bool = False) -> Match:
    """The definition: the longest suffix that also ends before the end, where it ends first or last."""
    count = len(text)
    ends = range(count - 2, -1, -1) if latest else range(count - 1)
    for length in range(count - 1, 0, -1):
        suffix = list(text[count - length :])
        for end in ends:
            if end - length + 1 >= 0 and list(text[end - length + 1 : end + 1]) == suffix:
                return Match(length, end)
    return Match(0, -1)


# Few letters make many repeats; a step appends some and then drops some.
STEPS = st.integers(1, 4).flatmap(
    lambda letters: st.lists(
        st.tuples(st.lists(st.integers(0, letters - 1), max_size=12), st.integers(0, 8)), max_size=8
    )
)


@given(STEPS)
def test_matches_are_those_of_the_definition_whatever_was_undone(steps: list[tuple[list[int], int]]) -> None:
    index, text = SuffixIndex(latest=True), []
    for tokens, dropped in steps:
        index.extend(tokens)
        text += tokens
        assert index.text == text
        assert index.earliest() == longest_match(text)
        assert index.latest() == longest_match(text, latest=True)
        del text[max(0, len(text) - dropped) :]
        index.shrink(len(text))
        assert index.earliest() == longest_match(text)
        assert index.latest() == longest_match(text, latest=True)


@given(STEPS)
def test_undoing_leaves_no_trace(steps: list[tuple[list[int], int]]) -> None:
    index = SuffixIndex([1, 0, 1, 0, 0], latest=True)
    fresh = SuffixIndex([1, 0, 1, 0, 0], latest=True)
    for tokens, _ in steps:
        index.extend(tokens)
    index.shrink(5)
    assert vars(index) == vars(fresh)


def test_long_repeats_use_the_long_chains() -> None:
    phrase = list(range(40))
    text = [*phrase, 99, *phrase, 98, *phrase]
    index = SuffixIndex(text, latest=True)
    assert index.earliest() == Match(40, 39)
    assert index.latest() == Match(40, 80)
    # The last 16 tokens stand at one more place, behind other words: the chain must walk past it.
    index = SuffixIndex([*phrase, 7, *phrase[20:], *phrase], latest=True)
    assert index.latest() == Match(40, 39) == longest_match(index.text, latest=True)


def test_latest_needs_its_chains() -> None:
    with pytest.raises(ValueError, match="latest=True"):
        SuffixIndex([1, 1]).latest()
