"""Accepted tokens place by place and block by block, from the outputs of ``decode``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deferral_train.rules.verify import Origin

ENDS = (Origin.RESAMPLED, Origin.BONUS)  # the verifier's own token, which every whole block ends with


def block_lengths(row: Mapping[str, Any]) -> list[int] | None:
    """Tokens emitted at each verifier call of a decoded row, the verifier's own included.

    A last block that the end of the text cut off says nothing of what would have been accepted, and is left out. None
    where a row's tokens were not verified block by block.
    """
    lengths, open_block = [], 0
    for origin in row["origin"]:
        open_block += 1
        if origin in ENDS:
            lengths.append(open_block)
            open_block = 0
    calls = row["counts"]["verifier_calls"]
    return lengths if len(lengths) + (open_block > 0) == calls and calls else None


def acceptance_by_length(lengths: Iterable[int]) -> tuple[dict[int, int], dict[int, float], dict[int, float]]:
    """Histogram of block lengths, and by length the share of blocks at least so long: given one less, and of all.

    As specdec_bench counts them: length 1 is a block of which no drafted token was accepted, so its share is 1.
    """
    histogram = dict(sorted(Counter(lengths).items()))
    total = left = sum(histogram.values())
    conditional, joint, before = {}, {}, 1.0
    for length, count in histogram.items():
        joint[length] = left / total
        conditional[length] = joint[length] / before
        before = joint[length]
        left -= count
    return histogram, conditional, joint


def acceptance_by_place(positions: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """Chance of each place of a drafted block to be emitted: given that all before it were, and from the start.

    Args:
        positions: counts by place, as ``summary.json`` of a decode run has them. Places that were never decided (the
            tail of a block after a rejection, or after the end of a text) are in neither.
    """
    conditional, marginal, product = [], [], 1.0
    for accepted, decided in zip(positions["accepted"], positions["decided"]):
        if not decided:
            break
        product *= accepted / decided
        conditional.append(accepted / decided)
        marginal.append(product)
    return {"conditional": conditional, "marginal": marginal}
