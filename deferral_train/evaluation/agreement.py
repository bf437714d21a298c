"""Two decode runs of the same prompts, text by text: where they part, and whether a tie of two logits explains it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TIE = 1e-4  # two logits closer than this may change places between two ways of computing them in float32


@dataclass(frozen=True)
class Difference:
    """Where two texts of one prompt part.

    Attributes:
        prompt: its id. place: of the first token that differs; of the shorter text's end where one begins the other.
        verifier_gap, drafter_gap: between the two highest logits there, by the first run's token log; None without.
    """

    prompt: str
    place: int
    verifier_gap: float | None
    drafter_gap: float | None

    @property
    def tie(self) -> bool:
        """True where the two highest logits of one of the models lie within `TIE`."""
        return any(gap is not None and gap <= TIE for gap in (self.verifier_gap, self.drafter_gap))


@dataclass
class Agreement:
    """Texts of one rule in two runs: ``prompts`` in both, ``same`` of them token for token, and the others."""

    prompts: int = 0
    same: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def ties(self) -> int:
        """Differences that a tie explains."""
        return sum(one.tie for one in self.differences)


def agreements(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]
) -> dict[str, Agreement]:
    """Agreement by rule, over the prompts and rules that both runs have; the first repetition of each.

    Args:
        first: rows of ``outputs.jsonl``; with ``--log-tokens`` they say how near the models' two best tokens were.
        second: of the other run.
    """
    theirs = {(row["rule"], row["id"]): row for row in second if row["repetition"] == 0}
    found: dict[str, Agreement] = {}
    for row in first:
        other = theirs.get((row["rule"], row["id"]))
        if row["repetition"] or other is None:
            continue
        agreement = found.setdefault(row["rule"], Agreement())
        agreement.prompts += 1
        if row["tokens"] == other["tokens"]:
            agreement.same += 1
            continue
        place = _parting(row["tokens"], other["tokens"])
        log = row.get("token_log") or []
        entry = log[place] if place < len(log) else {}
        gaps = [_gap(entry.get(f"{role}_top")) for role in ("verifier", "drafter")]
        agreement.differences.append(Difference(str(row["id"]), place, *gaps))
    return found


def _parting(first: Sequence[int], second: Sequence[int]) -> int:
    for place, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return place
    return min(len(first), len(second))


def _gap(candidates: Sequence[Sequence[Any]] | None) -> float | None:
    """Between the log probabilities of the two likeliest tokens, which is that of their logits."""
    if candidates is None or len(candidates) < 2:
        return None
    best, next_best = (one[1] for one in candidates[:2])
    return None if best is None or next_best is None else float(best - next_best)
