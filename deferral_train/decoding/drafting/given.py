"""A text from elsewhere as the draft: the previous output, where the source has grown since. With its metrics.

Source: self-speculative biased decoding (arXiv 2509.21740). As published: the previous output is reviewed in one
pass under the rule ``biased``, cut at the first token that does not stand, and decoded normally from there; the
last tokens are hidden from the display but kept in the draft. Erasure: Arivazhagan et al. 2020 (arXiv 1912.03393).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deferral_train.errors import InputError


@dataclass(frozen=True)
class GivenDraft:
    """Goes wherever a drafter goes: ``generate(..., drafter=GivenDraft(previous), rule="biased")``.

    Attributes:
        texts: ids for each row, without the end of sequence: whether the text is finished is for the verifier to
            say. May be empty.
    """

    texts: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(tuple(text) for text in self.texts))

    @property
    def longest(self) -> int:
        """Tokens of the longest text, at least 1."""
        return max([1, *(len(text) for text in self.texts)])

    def check(self, rows: int, vocab_size: int) -> None:
        """Refuse texts for another number of rows or of another vocabulary."""
        if len(self.texts) != rows:
            raise InputError(
                f"drafter: {len(self.texts)} given texts for {rows} rows; give one for each, maybe empty"
            )
        for row, text in enumerate(self.texts):
            if any(not 0 <= token < vocab_size for token in text):
                raise InputError(
                    f"drafter: given text {row} holds ids outside the vocabulary 0..{vocab_size - 1}"
                )


def displayed(output: Sequence[int], hidden: int, final: bool) -> list[int]:
    """The part of an output that is shown: all but its last ``hidden`` tokens, and all of the final one."""
    return list(output) if final or not hidden else list(output[:-hidden])


def erased(before: Sequence[int], after: Sequence[int]) -> int:
    """Tokens of ``before`` that a reader sees replaced: those behind the common prefix."""
    same = 0
    for first, second in zip(before, after):
        if first != second:
            break
        same += 1
    return len(before) - same


def normalised_erasure(shown: Sequence[Sequence[int]]) -> float:
    """Tokens erased over all updates, per token of the final text; 0 is a text that only grows."""
    if not shown or not shown[-1]:
        return 0.0
    return sum(erased(before, after) for before, after in pairwise(shown)) / len(shown[-1])
