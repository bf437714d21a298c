"""A verified block as Python lists, copied from the device once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.proposing import Draft
from deferral_train.rules.verify import Origin, Verdict


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
    depth = draft.depth
    columns = [draft.tokens, verdict.accepted[:, None], verdict.next_token[:, None], verdict.fault[:, None]]
    table = torch.cat([*columns, verdict.kept, verdict.deferred], dim=1).tolist()
    block = VerifiedBlock([], [], [], [], [], [], verdict.spent)
    for values, most in zip(table, draft.limits):
        drafted, (count, token, fault), decisions = (
            values[:depth],
            values[depth : depth + 3],
            values[depth + 3 :],
        )
        flags = ends.are_eos(drafted[:most])
        # What was drafted behind an end was never asked for; nothing follows it.
        limit = flags.index(True) + 1 if True in flags else most
        if limit < most and count >= limit:
            count, token = limit, -1
        origins = [int(Origin.KEPT if stands else Origin.ACCEPTED) for stands in decisions[:count]]
        emitted = drafted[:count]
        if token >= 0:
            emitted.append(token)
            origins.append(int(Origin.RESAMPLED if count < limit else Origin.BONUS))
        block.proposed.append(limit)
        block.accepted.append(count)
        block.emitted.append(emitted)
        block.origins.append(origins)
        block.deferred.append([bool(flag) for flag in decisions[depth : depth + limit]])
        block.faults.append(fault)
    return block
