"""A verified block as Python lists, copied from the device once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.proposing import Draft
from deferral_train.rules.verify import Verdict


@dataclass
class VerifiedBlock:
    """A verified block, one entry per running row.

    Attributes:
        proposed: drafted tokens, up to an end of sequence among them.
        accepted: of these, those that stand.
        emitted: the tokens on offer: those that stand, then the correction or the bonus if there is one.
        origins: where each of these comes from.
        deferred: the decision at each proposed place.
        faults: what verification found wrong with a row; 0 where nothing is.
        spent: [B] estimated loss so far under a limit, on the device, else None.
    """

    proposed: list[int]
    accepted: list[int]
    emitted: list[list[int]]
    origins: list[list[int]]
    deferred: list[list[bool]]
    faults: list[int]
    spent: Tensor | None = None


def on_host(verdict: Verdict, draft: Draft, ends: EndOfRow) -> VerifiedBlock:
    """A verdict on the host, in one transfer: tokens and decisions of all rows packed side by side."""
    rows, depth = draft.tokens.shape
    fault = getattr(verdict, "fault", None)
    small = [verdict.origin, verdict.deferred.view(torch.int8)]
    if fault is not None:
        small.append(fault[:, None])
    packed = torch.cat(small, dim=1).long()
    following = torch.stack([verdict.accepted, verdict.next_token], dim=1)
    table = torch.cat([draft.tokens, following, packed], dim=1).tolist()
    block = VerifiedBlock([], [], [], [], [], [0] * rows, verdict.spent)
    for row, (values, limit) in enumerate(zip(table, draft.limits)):
        drafted, (count, token) = values[:depth], values[depth : depth + 2]
        origins, deferred = values[depth + 2 : 2 * depth + 3], values[2 * depth + 3 : 3 * depth + 3]
        flags = ends.are_eos(drafted[:limit])
        if True in flags:  # what was drafted behind an end was never asked for
            limit = flags.index(True) + 1
        if count >= limit and limit < draft.limits[row]:
            count, token = limit, -1
        emitted = [*drafted[:count], token] if token >= 0 else drafted[:count]
        block.proposed.append(limit)
        block.accepted.append(count)
        block.emitted.append(emitted)
        block.origins.append(origins[: len(emitted)])
        block.deferred.append([bool(flag) for flag in deferred[:limit]])
        if fault is not None:
            block.faults[row] = values[-1]
    return block
