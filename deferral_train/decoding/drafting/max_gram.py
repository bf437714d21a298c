"""Max-Gram: proposes what followed the longest suffix of the text where it stood before. No model, no distribution.

Source: cascade speculative drafting (Chen et al. 2024, arXiv 2312.11462), section on statistical drafting. As
published: unbounded suffix, prompt and generated text, earliest match, greedy bigrams where there is none.
Ours: the index; a copy that reaches the end of the text goes on with what it has just copied, where the
published code matches once more; the latest match, a least length, and no bigrams as choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deferral_train.decoding.drafting.bigrams import BigramTable
from deferral_train.decoding.drafting.suffixes import Match, SuffixIndex
from deferral_train.errors import InputError

MATCHES = ("earliest", "latest")
BOUNDARY = -1  # stands between an encoder's prompt and the generated text: matches nothing, is never copied


@dataclass(frozen=True)
class MaxGram:
    """How to propose.

    Attributes:
        match: which of several places of the longest suffix to copy from, ``earliest`` or ``latest``.
        least: shortest suffix that counts as a match.
        bigrams: successors to fill up with where there is no match; None proposes nothing there.
    """

    match: str = "earliest"
    least: int = 1
    bigrams: BigramTable | None = None

    def __post_init__(self) -> None:
        if self.match not in MATCHES:
            raise InputError(f"max_gram match is {self.match!r}; use one of {', '.join(MATCHES)}")
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 1:
            raise InputError(f"max_gram least is {self.least!r}; a match has at least 1 token")

    def read(self, prompt: Sequence[int], separate: bool = False) -> MaxGramText:
        """A text that begins with ``prompt``; ``separate`` where generated text does not continue it."""
        return MaxGramText(self, [*prompt, BOUNDARY] if separate else prompt)


class MaxGramText:
    """The text of one row, as far as Max-Gram knows it.

    Attributes:
        prompt: tokens (and boundary) before the generated text.
    """

    def __init__(self, settings: MaxGram, prompt: Sequence[int]) -> None:
        self.settings, self.prompt = settings, len(prompt)
        self.index = SuffixIndex(prompt, latest=settings.match == "latest")

    def follow(self, size: int, tokens: Sequence[int]) -> None:
        """The generated text is its first ``size`` known tokens and then ``tokens``."""
        text, end = self.index.text, self.prompt + size
        same = 0
        for known, token in zip(text[end : end + len(tokens)], tokens):
            if known != token:
                break
            same += 1
        self.index.shrink(end + same)
        self.index.extend(tokens[same:])

    def match(self) -> Match:
        """Where the longest suffix that has occurred before is copied from."""
        return self.index.latest() if self.settings.match == "latest" else self.index.earliest()

    def propose(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may come next."""
        settings, text = self.settings, self.index.text
        match = self.match()
        proposal: list[int] = []
        if match.length >= settings.least:
            begin = match.end + 1
            proposal = text[begin : begin + count]
            while len(proposal) < count:  # the copy reads on in what it has copied
                proposal += proposal[: count - len(proposal)]
            if BOUNDARY in proposal:
                del proposal[proposal.index(BOUNDARY) :]
        if settings.bigrams is not None and len(proposal) < count and (text or proposal):
            last = proposal[-1] if proposal else text[-1]
            while len(proposal) < count and (last := settings.bigrams[last]) >= 0:
                proposal.append(last)
        return proposal
