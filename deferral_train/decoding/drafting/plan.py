"""A cascade of drafters as users describe it: the models, the K matrix, the lenience, Max-Gram at the bottom.

Source: cascade speculative drafting (Chen et al. 2024, arXiv 2312.11462), Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.errors import InputError


@dataclass(frozen=True)
class Plan:
    """Who proposes how much to whom.

    Models are numbered from the verifier down: 0 the verifier, 1 the largest drafter, ..., n the smallest.
    ``k[i][j]`` is the number of tokens that model j + 1 contributes to a draft that model i reviews; the last
    column is Max-Gram's. Entries are increments, as in the published code (the paper writes their running
    sums), and each is a minimum: a review hands on all that it has accepted and one token of its own. The
    first entries of a row come first (*horizontal*); a drafter whose own row is not 0 reviews instead of
    writing (*vertical*); one whose row is 0 writes a token per pass.

    Attributes:
        k: square matrix of n + 1 rows, 0 below the diagonal.
        lenience: l >= 1 of every review by a drafter, never of the verifier's.
        max_gram: settings of the last column; None where that column is 0.

    Raises:
        InputError: a matrix or a lenience that cannot be meant.
    """

    k: Sequence[Sequence[int]]
    lenience: float = 1.0
    max_gram: MaxGram | None = field(default_factory=MaxGram)

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", tuple(tuple(row) for row in self.k))
        _check_matrix(self.k, self.max_gram is not None)
        lenience = self.lenience
        if (
            isinstance(lenience, bool)
            or not isinstance(lenience, int | float)
            or not 1 <= lenience < math.inf
        ):
            raise InputError(
                f"lenience is {lenience}; give a finite number of at least 1 (1 is exact review)"
            )

    @property
    def drafters(self) -> int:
        """Neural drafters."""
        return len(self.k) - 1

    def described(self) -> dict[str, Any]:
        """The plan as plain values, for records; a bigram table by its hash."""
        copies = self.max_gram
        table = None if copies is None or copies.bigrams is None else copies.bigrams.fingerprint
        return {
            "k": [list(row) for row in self.k],
            "lenience": self.lenience,
            "match": None if copies is None else copies.match,
            "least": None if copies is None else copies.least,
            "bigrams": table,
        }

    @property
    def longest(self) -> tuple[int, ...]:
        """Most tokens of a draft that each model may have to review, verifier first."""
        bottom, found = self.drafters, [0] * len(self.k)
        for reviewer in range(bottom, -1, -1):
            total = 0
            for source in range(reviewer, bottom + 1):
                if self.k[reviewer][source]:
                    total += self.k[reviewer][source]
                    overshoot = 0 if source == bottom else found[source + 1]
                    found[reviewer] = max(found[reviewer], total + overshoot)
        return tuple(found)

    @property
    def depth(self) -> int:
        """Most tokens behind the end of a row at any time: drafts within drafts."""
        return sum(self.longest) + len(self.k)

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """(reviewer, source) pairs that occur, numbered as the rows and columns of k."""
        side = range(len(self.k))
        return {(reviewer, source) for reviewer in side for source in side if self.k[reviewer][source]}

    @property
    def one_hot_tail(self) -> bool:
        """True where the verifier reviews tokens of Max-Gram that no drafter has reviewed."""
        return self.k[0][-1] > 0

    @property
    def reviewing(self) -> tuple[int, ...]:
        """The drafters (0 the largest) whose tokens the verifier reviews."""
        return tuple(source for source in range(self.drafters) if self.k[0][source])


@dataclass(frozen=True)
class DraftCascade:
    """A plan with its models: goes wherever a drafter goes, ``generate(..., drafter=DraftCascade(...))``.

    Attributes:
        drafters: models over the verifier's tokens, the largest first; empty for Max-Gram alone.
        plan: who proposes how much to whom.
        tokenizer: fingerprint of the tokenizer, to refuse a bigram table of another; None where unknown.

    Raises:
        InputError: a matrix for another number of drafters, drafters that are not in order of size.
    """

    drafters: Sequence[Any]
    plan: Plan
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafters", tuple(self.drafters))
        if len(self.drafters) != self.plan.drafters:
            side = len(self.drafters) + 1
            raise InputError(
                f"k has {len(self.plan.k)} rows for {len(self.drafters)} drafter(s); give a {side} x {side} "
                "matrix: a row for the verifier and one for each drafter, the last column for Max-Gram"
            )
        sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in self.drafters]
        if sizes != sorted(sizes, reverse=True):
            raise InputError(f"drafters have {sizes} parameters; give the largest first")


def _check_matrix(k: Sequence[Sequence[int]], has_max_gram: bool) -> None:
    side = len(k)
    if side < 1 or any(len(row) != side for row in k):
        shape = f"{side} rows of {sorted({len(row) for row in k})}"
        raise InputError(f"k has {shape} entries; it must be square, one row per drafter and one more")
    for row, entries in enumerate(k):
        for column, entry in enumerate(entries):
            where = f"k[{row}][{column}] is {entry!r}"
            if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
                raise InputError(f"{where}; give whole numbers of tokens, 0 for none")
            if entry and column < row:
                raise InputError(f"{where}; a model reviews smaller ones only: 0 below the diagonal")
    if not any(k[0]):
        raise InputError("k has a first row of 0; the verifier would have nothing to review")
    for column in range(side - 1):
        if not any(row[column] for row in k):
            raise InputError(
                f"k has a column {column} of 0: drafter {column + 1} is never asked; leave it out"
            )
    if not has_max_gram and any(row[-1] for row in k):
        raise InputError(
            "k asks Max-Gram for tokens and max_gram is None; give MaxGram() or a last column of 0"
        )
