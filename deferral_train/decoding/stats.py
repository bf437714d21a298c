"""Statistics of a call: counts per row and per drafted position, model passes, the origin of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deferral_train.decoding.block import VerifiedBlock
from deferral_train.rules.verify import Origin

COUNTS = (
    "drafted",  # proposed by the drafter
    "kept",  # emitted, not deferred
    "accepted",  # emitted, deferred and passed the check
    "unverified",  # emitted without any verifier pass (lazy execution)
    "rejected",  # replaced by the verifier
    "discarded",  # drafted after a rejection, an end of sequence or a limit
    "resampled",  # emitted in place of a rejected or deferred token
    "bonus",  # emitted after a whole block
    "deferred",  # positions left to the verifier, among those whose decision counted
    "decided",  # positions whose decision counted: the emitted and the rejected ones
    "verifier_calls",  # verifier passes that this row took part in because it needed one
    "drafter_calls",  # drafter passes made for this row
)
POSITION_COUNTS = ("drafted", "decided", "deferred", "accepted", "rejected")


@dataclass(frozen=True)
class GenerationStats:
    """Counts of one call of ``cascade_generate``.

    Attributes:
        counts: one [R] int64 tensor per name in :data:`COUNTS`; ``drafted = kept + accepted + unverified +
            rejected + discarded`` on every row.
        positions: one [T] int64 tensor per name in :data:`POSITION_COUNTS`, summed over rows; index = place
            in the drafted block. ``accepted`` counts kept tokens too: every drafted token that was emitted.
        origin: [R, N] int8, an :class:`~deferral_train.rules.verify.Origin` per emitted token, NONE after.
        spent: [R] float64, estimated loss spent under ``max_request_loss``, else None.
        verifier_passes, drafter_passes: forward passes of the whole batch.
    """

    counts: dict[str, Tensor]
    positions: dict[str, Tensor]
    origin: Tensor
    spent: Tensor | None
    verifier_passes: int
    drafter_passes: int

    def __getattr__(self, name: str) -> Tensor:
        if name in COUNTS:
            return self.counts[name]
        raise AttributeError(name)

    @property
    def emitted(self) -> Tensor:
        """Tokens emitted per row, [R]."""
        return (self.origin != Origin.NONE).sum(dim=1)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted per verifier call, bonus included; infinite where the verifier was never called."""
        return _ratio(self.emitted, self.verifier_calls, float("inf"))

    @property
    def deferral_rate(self) -> float:
        """Deferred positions among those decided."""
        return _ratio(self.deferred, self.decided, 0.0)

    @property
    def rejection_rate(self) -> float:
        """Rejected positions among those decided."""
        return _ratio(self.rejected, self.decided, 0.0)

    def row(self, index: int) -> dict[str, int]:
        """The counts of one row."""
        return {name: int(values[index]) for name, values in self.counts.items()} | {
            "emitted": int(self.emitted[index])
        }

    @staticmethod
    def joined(parts: Sequence[GenerationStats]) -> GenerationStats:
        """Statistics of several calls as one, rows in order."""
        width = max(part.origin.shape[1] for part in parts)
        origins = [torch.nn.functional.pad(p.origin, (0, width - p.origin.shape[1])) for p in parts]
        depth = max(len(part.positions["drafted"]) for part in parts)
        positions = {
            name: sum(_padded(part.positions[name], depth) for part in parts) for name in POSITION_COUNTS
        }
        spent = [part.spent for part in parts if part.spent is not None]
        return GenerationStats(
            counts={name: torch.cat([part.counts[name] for part in parts]) for name in COUNTS},
            positions=positions,  # type: ignore[arg-type]
            origin=torch.cat(origins),
            spent=torch.cat(spent) if spent else None,
            verifier_passes=sum(part.verifier_passes for part in parts),
            drafter_passes=sum(part.drafter_passes for part in parts),
        )


def _ratio(above: Tensor, below: Tensor, otherwise: float) -> float:
    total = int(below.sum())
    return int(above.sum()) / total if total else otherwise


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))


@dataclass
class StatsRecorder:
    """Collects what each round did and adds it up at the end, so that a round costs almost nothing.

    Args:
        rows: rows of the call.
        depth: most tokens in a drafted block.

    Attributes:
        spent: [R] float64, estimated loss of every row under a limit, on the device until the end; else None.
    """

    rows: int
    depth: int
    totals: dict[str, list[int]] = field(init=False)
    positions: dict[str, list[int]] = field(init=False)
    origins: list[list[int]] = field(init=False)
    spent: Tensor | None = None
    blocks: list[tuple[list[int], list[int], list[int], VerifiedBlock]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.totals = {name: [0] * self.rows for name in COUNTS}
        self.positions = {name: [0] * self.depth for name in POSITION_COUNTS}
        self.origins = [[] for _ in range(self.rows)]

    def block(
        self, rows: list[int], counts: list[int], drafter_calls: list[int], block: VerifiedBlock
    ) -> None:
        """One verified block: per running row the tokens emitted after cutting, and the passes made for it."""
        self.blocks.append((rows, counts, drafter_calls, block))

    def emit(self, row: int, origin: Origin) -> None:
        """One token emitted outside of a block."""
        self.origins[row].append(int(origin))

    def add(self, row: int, **amounts: int) -> None:
        """Add to the row's counts."""
        for name, amount in amounts.items():
            self.totals[name][row] += amount

    def settle(self) -> None:
        """Add up the blocks collected so far."""
        for rows, counts, calls, block in self.blocks:
            for place, row in enumerate(rows):
                self.totals["drafter_calls"][row] += calls[place]
                self._settle_row(
                    row,
                    block.proposed[place],
                    block.accepted[place],
                    block.origins[place][: counts[place]],
                    block.deferred[place],
                )
        self.blocks.clear()

    def _settle_row(
        self, row: int, proposed: int, accepted: int, origins: list[int], deferred: list[bool]
    ) -> None:
        count = len(origins)
        self.origins[row].extend(origins)
        taken = min(count, accepted)
        rejected = int(accepted < proposed and count > accepted)
        decided = taken + rejected
        self.add(
            row,
            drafted=proposed,
            kept=origins.count(Origin.KEPT),
            accepted=origins.count(Origin.ACCEPTED),
            rejected=rejected,
            discarded=proposed - decided,
            resampled=origins.count(Origin.RESAMPLED),
            bonus=origins.count(Origin.BONUS),
            deferred=sum(deferred[:decided]),
            decided=decided,
            verifier_calls=1,
        )
        positions = self.positions
        for place in range(proposed):
            positions["drafted"][place] += 1
        for place in range(decided):
            positions["decided"][place] += 1
            positions["deferred"][place] += deferred[place]
            positions["rejected" if place == accepted else "accepted"][place] += 1

    def finish(self, verifier_passes: int, drafter_passes: int) -> GenerationStats:
        """The statistics of the call.

        Raises:
            RuntimeError: the counts of a row do not add up (a defect of the loop, never of the input).
        """
        self.settle()
        for row in range(self.rows):
            self._check(row)
        width = max(len(row) for row in self.origins)
        origin = torch.tensor([row + [0] * (width - len(row)) for row in self.origins], dtype=torch.int8)
        return GenerationStats(
            counts={name: torch.tensor(values) for name, values in self.totals.items()},
            positions={name: torch.tensor(values) for name, values in self.positions.items()},
            origin=origin.reshape(self.rows, width),
            spent=None if self.spent is None else self.spent.cpu(),
            verifier_passes=verifier_passes,
            drafter_passes=drafter_passes,
        )

    def _check(self, row: int) -> None:
        of = {name: values[row] for name, values in self.totals.items()}
        emitted = of["kept"] + of["accepted"] + of["unverified"] + of["resampled"] + of["bonus"]
        parts = of["kept"] + of["accepted"] + of["unverified"] + of["rejected"] + of["discarded"]
        if of["drafted"] != parts or emitted != len(self.origins[row]):
            raise RuntimeError(f"row {row}: counts do not add up: {of}, emitted {len(self.origins[row])}")
