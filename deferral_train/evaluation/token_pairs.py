"""Pairs of tokens (drafter's, verifier's) that a head holds most harmless and most harmful to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deferral_train.heads.base import DeferralHead
from deferral_train.traces import Traces
from deferral_train.traces.sequence import labelled_rows, sequence_gap


@dataclass(frozen=True)
class TokenPair:
    """A pair of argmaxes at labelled places.

    Attributes:
        drafter, verifier: the tokens, as text.
        count: places where they stood against each other.
        estimate: mean gap that the head estimates there.
        label: mean gap that the labels say.
    """

    drafter: str
    verifier: str
    count: int
    estimate: float
    label: float


@dataclass(frozen=True)
class TokenPairs:
    """The pairs at both ends, by the head's estimate."""

    harmless: list[TokenPair]
    harmful: list[TokenPair]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Two tables of a line per pair."""
        parts = []
        for title, pairs in (
            ("most harmless to keep", self.harmless),
            ("most harmful to keep", self.harmful),
        ):
            parts.append(f"{title}: drafter's token for the verifier's, places, estimated and labelled gap")
            parts += [
                f"  {one.drafter!r:>18} for {one.verifier!r:<18} {one.count:>5} "
                f"{one.estimate:>+8.3f} {one.label:>+8.3f}"
                for one in pairs
            ]
        return "\n".join(parts)


def token_pairs(
    traces: Sequence[Traces], head: DeferralHead, tokenizer: Any, fewest: int = 5, shown: int = 12
) -> TokenPairs:
    """The pairs with the lowest and the highest mean estimate.

    Args:
        traces: with sequence labels.
        head: estimates gaps.
        tokenizer: of the pair.
        fewest: places that a pair must have.
        shown: pairs at each end.
    """
    tokens, estimates, labels = [], [], []
    for part in traces:
        rows = labelled_rows(part)
        names = list(dict.fromkeys([*head.features, "drafter_argmax", "verifier_argmax"]))
        summary = part.summary(names).select(rows)
        tokens.append(np.stack([summary.drafter_argmax.numpy(), summary.verifier_argmax.numpy()], axis=1))
        estimates.append(head.gap(summary).double().numpy())
        labels.append(sequence_gap(part)[rows].double().numpy())
    pairs, place = np.unique(np.concatenate(tokens), axis=0, return_inverse=True)
    place = place.reshape(-1)
    count = np.bincount(place)
    means = [np.bincount(place, weights=np.concatenate(values)) / count for values in (estimates, labels)]
    often = np.flatnonzero(count >= fewest)
    order = often[np.argsort(means[0][often], kind="stable")]
    ends = [order[:shown], order[::-1][:shown]]

    def described(number: int) -> TokenPair:
        drafter, verifier = (_text(tokenizer, int(token)) for token in pairs[number])
        return TokenPair(
            drafter, verifier, int(count[number]), float(means[0][number]), float(means[1][number])
        )

    return TokenPairs(*([described(number) for number in end] for end in ends))


def _text(tokenizer: Any, token: int) -> str:
    """A token as it stands in the vocabulary, with the mark of a word's beginning as a space."""
    return str(tokenizer.convert_ids_to_tokens(token)).replace("\u2581", " ").replace("\u0120", " ")
