"""The rows being decoded: their tokens, how long each is, which are still running."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deferral_train.errors import InputError


class TokenRows:
    """Token ids of every row, prompt first, each row as long as it happens to be.

    ``ids`` [R, C] holds all rows of the call, prompts with their padding included; ``lengths`` counts the
    columns in use of the *running* rows, whose places in ``ids`` are ``rows``. Drafted tokens are written
    behind a row's end before they are accepted, so that processors and models read one buffer.

    Args:
        input_ids: prompts [R, P] (encoder-decoder: decoder start tokens), padded on the left.
        mask: prompt mask [R, P], or None where nothing is padded.
        max_length: columns that a row may fill at most.
        num_draft_tokens: room behind the end for a drafted block.
        pad_token_id: fills what no row has written.

    Raises:
        InputError: padding that is not on the left.
    """

    rows: list[int]
    lengths: list[int]
    index: Tensor

    def __init__(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        max_length: int,
        num_draft_tokens: int,
        pad_token_id: int,
    ) -> None:
        count, self.prompt_length = input_ids.shape
        columns = max_length + num_draft_tokens + 1
        self.ids = torch.full((count, columns), pad_token_id, dtype=torch.long, device=input_ids.device)
        self.ids[:, : self.prompt_length] = input_ids
        self._sent: tuple[list[int], Tensor] | None = None
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.pads = left_padding(mask, count)
        self.final_lengths = [self.prompt_length] * count
        self.restart(range(count))

    @property
    def device(self) -> torch.device:
        """Where the ids live."""
        return self.ids.device

    @property
    def room(self) -> list[int]:
        """Tokens that each running row may still emit."""
        return [self.max_length - length for length in self.lengths]

    def _block(self) -> slice | None:
        """The running rows as a slice of ``ids`` where they lie together and are of one length, else None."""
        first, behind = self.rows[0], self.rows[-1] + 1
        if behind - first != len(self.rows) or min(self.lengths) != max(self.lengths):
            return None
        return slice(first, behind)

    def window(self, behind: int, ahead: int, table: Tensor | None = None) -> Tensor:
        """The last ``behind`` tokens of each running row and ``ahead`` columns more, [B, behind + ahead].

        A row shorter than ``behind`` gets its first token in the columns before it.

        Args:
            table: what else is known of every column of every row [.., R, C], in place of the tokens.
        """
        values = self.ids if table is None else table
        block = self._block()
        if block is not None and behind <= self.lengths[0]:
            length = self.lengths[0]
            return values[..., block, length - behind : length + ahead]
        columns = self._columns(-behind, ahead)
        if behind > min(self.lengths):
            columns = columns.clamp(min=0)
        return values[..., self.index[:, None], columns]

    def shown(self, ahead: int, ended: Sequence[int | None] | None = None) -> Tensor:
        """All rows of the call [R, length + ahead] as ``generate`` shows them, padding behind a row's end.

        The running rows are of one length.

        Args:
            ahead: drafted columns to show.
            ended: [B] drafted tokens of a running row that ends among them, else None.
        """
        length = self.lengths[0] + ahead
        ends = [min(end, length) for end in self.final_lengths]
        for place, row in enumerate(self.rows):
            end = None if ended is None else ended[place]
            ends[row] = length if end is None else min(length, self.lengths[place] + end)
        ids = self.ids[:, :length]
        if min(ends) == length:
            return ids
        behind = torch.arange(length, device=self.device) >= on_device(ends, self.device)[:, None]
        return ids.masked_fill(behind, self.pad_token_id)

    def previous(self, back: int, columns: int) -> Tensor:
        """The token ``back`` places before each of the next ``columns`` places of every running row, [B, columns].

        Drafted tokens count as they stand in the buffer; -1 where the place lies in the prompt.
        """
        places = self._columns(-back, columns - back)
        found = self.ids[self.index[:, None], places.clamp(min=0)]
        return found.masked_fill(places < self.prompt_length, -1)

    def write(self, offset: int, block: Tensor) -> None:
        """Put ``block`` [B, n] behind each row's end, ``offset`` columns on; it may come from a drafter's device."""
        block = block.to(self.device)
        together = self._block()
        if together is not None:
            begin = self.lengths[0] + offset
            self.ids[together, begin : begin + block.shape[1]] = block
        else:
            self.ids[self.index[:, None], self._columns(offset, offset + block.shape[1])] = block

    def column(self, offset: int) -> Tensor | None:
        """Where the token ``offset`` columns behind each row's end belongs, [B, 1], to be written in place; None where
        the rows do not lie together.
        """
        together = self._block()
        if together is None:
            return None
        begin = self.lengths[0] + offset
        return self.ids[together, begin : begin + 1]

    def put(self, offsets: Tensor, values: Tensor) -> None:
        """One token per running row, ``offsets`` [B] columns behind its end."""
        self.ids[self.index, self._ends_on_device + offsets] = values

    def put_last(self, blocks: Sequence[Sequence[int]]) -> None:
        """Of each row's ``blocks[b]``, whose other tokens are written already, the last one."""
        places = [(b, block) for b, block in enumerate(blocks) if block]
        if len(places) == 1:
            (place, block), *_ = places
            self.ids[self.rows[place], self.lengths[place] + len(block) - 1] = block[-1]
            return
        rows = [self.rows[b] for b, _ in places]
        columns = [self.lengths[b] + len(block) - 1 for b, block in places]
        values = [block[-1] for _, block in places]
        where = on_device(torch.tensor([rows, columns, values]), self.device)
        self.ids[where[0], where[1]] = where[2]

    @property
    def _ends_on_device(self) -> Tensor:
        """``lengths`` [B] as a tensor, sent to the device once for every change."""
        if self._sent is None or self._sent[0] is not self.lengths:
            self._sent = self.lengths, on_device(self.lengths, self.device)
        return self._sent[1]

    def _columns(self, first: int, last: int) -> Tensor:
        return self._ends_on_device[:, None] + torch.arange(first, last, device=self.device)[None]

    def extend(self, counts: Sequence[int]) -> None:
        """Rows have grown by ``counts`` tokens, already written."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]
        for row, length in zip(self.rows, self.lengths):
            self.final_lengths[row] = length

    def keep_rows(self, kept: Sequence[int], index: Tensor) -> None:
        """Only these of the running rows go on."""
        self.rows = [self.rows[place] for place in kept]
        self.lengths = [self.lengths[place] for place in kept]
        self.index = self.index.index_select(0, index)

    @property
    def row_pads(self) -> list[int]:
        """Padding columns of the running rows' prompts."""
        return [self.pads[row] for row in self.rows]

    def restart(self, rows: Sequence[int]) -> None:
        """Run these rows of the call from their prompts, alone."""
        self.rows = list(rows)
        self.index = on_device(self.rows, self.device)
        self.lengths = [self.prompt_length] * len(self.rows)
        for row in rows:
            self.final_lengths[row] = self.prompt_length

    def sequences(self) -> Tensor:
        """All rows, prompt and emitted tokens, padded on the right to the longest, [R, L]."""
        longest = max(self.final_lengths)
        ends = on_device(self.final_lengths, self.device)[:, None]
        behind = torch.arange(longest, device=self.device)[None] >= ends
        return self.ids[:, :longest].masked_fill(behind, self.pad_token_id)

    def emitted(self, row: int) -> Tensor:
        """Tokens that row ``row`` of the call has emitted so far."""
        return self.ids[row, self.prompt_length : self.final_lengths[row]]


def on_device(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Host integers as an int64 tensor on ``device``; on CUDA the host does not wait for what the device is doing."""
    host = torch.as_tensor(values, dtype=torch.long)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def left_padding(mask: Tensor | None, count: int) -> list[int]:
    """Padding columns on the left of each row of ``mask`` [R, P]; zeros for None.

    Raises:
        InputError: padding elsewhere, or a prompt that is all padding.
    """
    if mask is None:
        return [0] * count
    present = mask.bool()
    pads = (~present).sum(dim=1)
    columns = torch.arange(mask.shape[1], device=mask.device)[None]
    if not torch.equal(present, columns >= pads[:, None]):
        raise InputError(
            "attention_mask: prompts must be padded on the left; set tokenizer.padding_side = 'left'"
        )
    if bool((pads == mask.shape[1]).any()):
        raise InputError("attention_mask: a row masks its whole prompt; give every row at least one token")
    return pads.tolist()
