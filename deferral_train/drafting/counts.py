"""How often each reviewer let through what each source proposed, by place in the draft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deferral_train.drafting.plan import Plan


class ReviewCounts:
    """Counts of one run, for the speed model.

    A place counts as tried where everything before it was accepted. Where Max-Gram was asked for more than it
    had, the first place that it left empty counts as tried and not accepted.

    Attributes:
        tried, accepted: per (reviewer, source) a list by place in the draft; reviewer 0 is the verifier, source 0
            the largest drafter, the last one Max-Gram.
        reviews: reviews per model; those of a drafter are its passes, row by row.
    """

    def __init__(self, plan: Plan) -> None:
        self._bottom = plan.drafters
        self.tried: dict[tuple[int, int], list[int]] = {}
        self.accepted: dict[tuple[int, int], list[int]] = {}
        self.reviews = [0] * (plan.drafters + 1)

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
            for place, source in enumerate(sources[row][: accepted[row] + 1]):
                self._count(reviewer, source, place, place < accepted[row])
            if missing[row] and accepted[row] == len(sources[row]):
                self._count(reviewer, self._bottom, len(sources[row]), False)

    def _count(self, reviewer: int, source: int, place: int, stands: bool) -> None:
        for table, amount in ((self.tried, 1), (self.accepted, int(stands))):
            column = table.setdefault((reviewer, source), [])
            column += [0] * (place + 1 - len(column))
            column[place] += amount

    def rate(self, reviewer: int, source: int) -> float | None:
        """Accepted over tried, all places together; None where nothing was tried."""
        tried = sum(self.tried.get((reviewer, source), ()))
        return sum(self.accepted[reviewer, source]) / tried if tried else None
