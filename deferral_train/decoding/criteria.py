"""When a row ends: end-of-sequence tokens, length and any other stopping criterion, checked token by
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from deferral_train.decoding.tokens import TokenRows


class EndOfRow:
    """Splits a prepared list of stopping criteria into what is checked for a block at once and what per
    token.

    Attributes:
        max_length: columns that a row may fill, the least of the length criteria.
    """

    def __init__(self, criteria: Sequence[Any], max_length: int) -> None:
        limits = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        self.max_length = min([max_length, *limits])
        ends = [one.eos_token_id.flatten() for one in criteria if type(one) is EosTokenCriteria]
        self.eos = torch.cat(ends) if ends else None
        self._eos_set = frozenset() if self.eos is None else frozenset(self.eos.tolist())
        self.others = [one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]

    def is_eos(self, block: Tensor) -> Tensor:
        """Which tokens of ``block`` end a row, bool of the same shape."""
        if self.eos is None:
            return torch.zeros_like(block, dtype=torch.bool)
        return torch.isin(block, self.eos.to(block.device))

    def are_eos(self, block: Sequence[int]) -> list[bool]:
        """The same for tokens that are on the host already."""
        return [token in self._eos_set for token in block]

    def cut(
        self, tokens: TokenRows, block: Sequence[Sequence[int]], counts: list[int]
    ) -> tuple[list[int], list[bool]]:
        """How many tokens of a written block are really emitted, and which rows end with them.

        Args:
            tokens: the rows; ``block`` [B][n] is already written behind their ends.
            counts: tokens on offer per row; no row gets more, nor a token beyond its end.
        """
        counts = [min(count, room) for count, room in zip(counts, tokens.room)]
        done = [count == room for count, room in zip(counts, tokens.room)]
        for row, ids in enumerate(block):
            flags = self.are_eos(ids[: counts[row]])
            if True in flags:
                counts[row], done[row] = flags.index(True) + 1, True
        if self.others:
            self._cut_by_others(tokens, counts, done)
        return counts, done

    def _cut_by_others(self, tokens: TokenRows, counts: list[int], done: list[bool]) -> None:
        lengths = tokens.lengths
        ends = sorted({length + step + 1 for length, count in zip(lengths, counts) for step in range(count)})
        open_rows = set(range(len(counts)))
        for end in ends:
            flags = torch.zeros(len(tokens.ids), dtype=torch.bool, device=tokens.device)
            for criterion in self.others:
                flags |= criterion(tokens.ids[:, :end], None)
            for place in list(open_rows):
                here = lengths[place] < end <= lengths[place] + counts[place]
                if here and bool(flags[tokens.rows[place]]):
                    counts[place], done[place] = end - lengths[place], True
                    open_rows.discard(place)
