"""When a row ends: end-of-sequence tokens, length and any other stopping criterion, checked token by
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from deferral_train.decoding.distributions import needs_real_rows
from deferral_train.decoding.tokens import TokenRows


def longest_row(criteria: Sequence[Any], max_length: int, prompt: int) -> int:
    """Columns that a row may fill.

    A caller's ``MaxLengthCriteria`` stands in the place of ``generate``'s own, and is asked once a token is there.

    Args:
        criteria: as prepared by ``generate``.
        max_length: of the generation config.
        prompt: columns of the prompt.
    """
    limits = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    return max(min(limits), prompt + 1) if limits else max_length


class EndOfRow:
    """Splits a prepared list of stopping criteria into what is checked for a block at once and what per
    token.

    Attributes:
        max_length: columns that a row may fill.
        strict: a criterion may be shown nothing but text that rows have, as ``generate`` shows it.
        joint: no token ends a row, so that ``generate`` writes on in every row until criteria have ended all of them.
    """

    def __init__(self, criteria: Sequence[Any], max_length: int) -> None:
        self.max_length = max_length
        ends = [one.eos_token_id.flatten() for one in criteria if type(one) is EosTokenCriteria]
        self.eos = torch.cat(ends) if ends else None
        self._eos_set = frozenset() if self.eos is None else frozenset(self.eos.tolist())
        self.others = [one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.strict = any(needs_real_rows(one) for one in self.others)
        self.joint = bool(self.others) and not any(hasattr(one, "eos_token_id") for one in criteria)
        self._over: set[int] = set()  # rows that criteria have ended, where rows end jointly

    def are_eos(self, block: Sequence[int]) -> list[bool]:
        """Which tokens on the host end a row."""
        return [token in self._eos_set for token in block]

    def lengths(self, block: Tensor, limits: Tensor | None) -> Tensor | None:
        """Tokens of each row of ``block`` [B, T] up to its first end, on the device, [B]; None for all of them.

        Args:
            limits: [B] tokens that count at most; None for all.
        """
        if self.eos is None or not block.shape[1]:
            return limits
        ends = torch.isin(block, self.eos.to(block.device))
        before = (ends.cumsum(dim=1) - ends.long()) == 0  # up to the first end and with it
        found = before.sum(dim=1)
        return found if limits is None else torch.minimum(found, limits)

    def cut(
        self, tokens: TokenRows, block: Sequence[Sequence[int]], counts: list[int], together: bool = False
    ) -> tuple[list[int], list[bool]]:
        """How many tokens of a written block are really emitted, and which rows end with them.

        Args:
            tokens: the rows; ``block`` [B][n] is already written behind their ends.
            counts: tokens on offer per row; no row gets more, nor a token beyond its end.
            together: all rows get the same number of tokens.
        """
        counts = [min(count, room) for count, room in zip(counts, tokens.room)]
        done = [count == room for count, room in zip(counts, tokens.room)]
        for row, ids in enumerate(block):
            flags = self.are_eos(ids[: counts[row]])
            if True in flags:
                counts[row], done[row] = flags.index(True) + 1, True
        if together:
            # A row that ends counts, too: where its draft fell the places behind were shown to no processor.
            least = min(counts, default=0)
            done = [over and count <= least for count, over in zip(counts, done)]
            counts = [min(count, least) for count in counts]
        if self.others:
            self._cut_by_others(tokens, counts, done)
        return counts, done

    def _cut_by_others(self, tokens: TokenRows, counts: list[int], done: list[bool]) -> None:
        lengths, joint = list(tokens.lengths), self.joint and len(tokens.ids) > 1
        if lengths[0] == tokens.prompt_length:
            self._over.clear()
        ends = sorted({length + step + 1 for length, count in zip(lengths, counts) for step in range(count)})
        open_rows = set(range(len(counts)))
        flags = torch.zeros(len(tokens.ids), dtype=torch.bool, device=tokens.device)
        for end in ends:
            if len(set(lengths)) == 1:
                over = [count if ended else None for count, ended in zip(counts, done)]
                shown = tokens.shown(end - lengths[0], over)
            else:
                shown = tokens.ids[:, :end]
            flags.zero_()
            for criterion in self.others:
                flags |= criterion(shown, None)
            if joint:
                self._over.update(row for row in tokens.rows if bool(flags[row]))
                if self._over >= set(tokens.rows):
                    counts[:], done[:] = [end - lengths[0]] * len(counts), [True] * len(done)
                    return
                continue
            for place in list(open_rows):
                here = lengths[place] < end <= lengths[place] + counts[place]
                if here and bool(flags[tokens.rows[place]]):
                    counts[place], done[place] = end - lengths[place], True
                    open_rows.discard(place)
