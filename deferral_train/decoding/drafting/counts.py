"""How often each reviewer let through what each source proposed: what the speed model is fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from deferral_train.errors import InputError

LEAST = 30  # tries that a place needs for a rate of its own


class ReviewCounts:
    """Counts of the reviews of a cascade of drafters.

    A place counts as tried where everything before it was accepted. Where Max-Gram was asked for more than it
    had, the first place that it left empty counts as tried and not accepted.

    Args:
        drafters: neural drafters; sources are numbered from 0, the largest, to Max-Gram, reviewers from 0, the
            verifier.

    Attributes:
        tried, accepted: per (reviewer, source) a list by place within the run of that source's tokens.
        reviews: reviews per reviewer, counted row by row; those of a drafter are its passes.
    """

    def __init__(self, drafters: int) -> None:
        self.drafters = drafters
        self.tried: dict[tuple[int, int], list[int]] = {}
        self.accepted: dict[tuple[int, int], list[int]] = {}
        self.reviews = [0] * (drafters + 1)

    def add(
        self,
        reviewer: int,
        sources: Sequence[Sequence[int]],
        missing: Sequence[bool],
        accepted: Sequence[int],
        rows: Iterable[int],
    ) -> None:
        """A review of some rows: the sources of each row's tokens and how many of them were accepted."""
        for row in rows:
            self.reviews[reviewer] += 1
            tokens, stand = sources[row], accepted[row]
            run = 0
            for place, source in enumerate(tokens[: stand + 1]):
                run = run + 1 if place and tokens[place - 1] == source else 0
                self._count(reviewer, source, run, place < stand)
            if missing[row] and stand == len(tokens):
                run = run + 1 if tokens and tokens[-1] == self.drafters else 0
                self._count(reviewer, self.drafters, run, False)

    def _count(self, reviewer: int, source: int, place: int, stands: bool) -> None:
        for table, amount in ((self.tried, 1), (self.accepted, int(stands))):
            column = table.setdefault((reviewer, source), [])
            column += [0] * (place + 1 - len(column))
            column[place] += amount

    def rate(self, reviewer: int, source: int) -> float | None:
        """Accepted over tried, all places together; None where nothing was tried."""
        tried = sum(self.tried.get((reviewer, source), ()))
        return sum(self.accepted[reviewer, source]) / tried if tried else None

    def acceptance(self, least: int = LEAST) -> dict[tuple[int, int], list[float]]:
        """Rates by place for the speed model; the last places are pooled until they hold ``least`` tries."""
        found = {}
        for pair, tried in self.tried.items():
            # Tries from each place on: the last place that has enough of them takes the rest with it.
            remaining = list(accumulate(reversed(tried)))[::-1]
            last = max((place for place, tries in enumerate(remaining) if tries >= least), default=0)
            accepted = self.accepted[pair]
            rates = [accepted[place] / tried[place] for place in range(last)]
            found[pair] = [*rates, sum(accepted[last:]) / remaining[last]]
        return found

    @staticmethod
    def joined(parts: Sequence[ReviewCounts]) -> ReviewCounts:
        """The sum of several counts.

        Raises:
            InputError: nothing to add up, or counts of different cascades.
        """
        if len({part.drafters for part in parts}) != 1:
            raise InputError("review counts: give one or more, all of the same drafters")
        whole = ReviewCounts(parts[0].drafters)
        for part in parts:
            whole.reviews = [a + b for a, b in zip(whole.reviews, part.reviews)]
            for mine, theirs in ((whole.tried, part.tried), (whole.accepted, part.accepted)):
                for pair, column in theirs.items():
                    known = mine.setdefault(pair, [])
                    known += [0] * (len(column) - len(known))
                    for place, amount in enumerate(column):
                        known[place] += amount
        return whole
