"""A drafted block as it is given to verification: shapes checked once, positions read as rows.

Knows nothing about rules. B batch, T drafted positions, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.laws import Laws, as_float, check_temperature
from deferral_train.rules.summary import Summary

# 1 MiB of float32 per law: small enough that a chunk's intermediates stay in a core's cache.
CHUNK_ELEMENTS = 2**18
BONUSES = ("verifier", "exact", "none")


@dataclass(frozen=True)
class Block:
    """Drafted tokens and both models' logits, checked. `drafter_logits` None: one-hot proposals."""

    drafted: Tensor  # [B, T] int64, 0 beyond a row's length
    lengths: Tensor  # [B] int64
    drafter_logits: Tensor | None  # [B, T or T+1, V]
    verifier_logits: Tensor  # [B, T+1, V]; T rows where no bonus is drawn
    drafter_sampling_logits: Tensor | None
    verifier_sampling_logits: Tensor | None
    temperature: float
    context: Summary | None  # [B, T or T+1, ..]

    @classmethod
    def of(
        cls,
        drafted: Tensor,
        drafter_logits: Tensor | None,
        verifier_logits: Tensor,
        temperature: float,
        drafter_sampling_logits: Tensor | None,
        verifier_sampling_logits: Tensor | None,
        lengths: Tensor | None,
        context: Summary | None,
    ) -> Block:
        """Check everything that needs no pass over the vocabulary.

        Raises:
            InputError: shapes, vocabularies or ids that do not fit.
        """
        if not isinstance(drafted, Tensor) or drafted.dim() != 2 or drafted.dtype.is_floating_point:
            raise InputError("drafted must be an integer tensor [B, T] of token ids")
        rows, drafts = drafted.shape
        verifier = as_float(verifier_logits, "verifier_logits")
        vocabulary = verifier.shape[-1]
        _check_shape("verifier_logits", verifier, rows, (drafts, drafts + 1), vocabulary)
        counts = verifier.shape[1]
        given: dict[str, Tensor | None] = dict.fromkeys(
            ("drafter_logits", "drafter_sampling_logits", "verifier_sampling_logits")
        )
        for name, logits, allowed in (
            ("drafter_logits", drafter_logits, (drafts, drafts + 1)),
            ("drafter_sampling_logits", drafter_sampling_logits, (drafts, drafts + 1)),
            ("verifier_sampling_logits", verifier_sampling_logits, (counts,)),
        ):
            if logits is not None:
                given[name] = as_float(logits, name)
                _check_shape(name, as_float(logits, name), rows, allowed, vocabulary)
        if drafter_logits is None and drafter_sampling_logits is not None:
            raise InputError(
                "drafter_sampling_logits without drafter_logits; pass both, or neither (one-hot)"
            )
        lengths = _check_lengths(lengths, drafted)
        inside = torch.arange(drafts, device=drafted.device) < lengths.unsqueeze(1)
        tokens = torch.where(inside, drafted, 0).long()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(f"drafted holds ids outside the vocabulary 0..{vocabulary - 1}")
        return cls(
            tokens,
            lengths,
            temperature=check_temperature(temperature),
            context=_check_context(context, rows, drafts),
            verifier_logits=verifier,
            **given,
        )

    @property
    def inside(self) -> Tensor:
        """Positions that were drafted, bool [B, T]."""
        steps = torch.arange(self.drafted.shape[1], device=self.drafted.device)
        return steps < self.lengths.unsqueeze(1)

    @cached_property
    def whole(self) -> Laws | None:
        """Laws [B * T, V] of all positions, row by row, kept for what is read twice.

        None where they are more than a chunk, off the CPU, without a drafter law, or not all drafted.
        """
        rows, drafts = self.drafted.shape
        if self.drafter_logits is None or not 0 < rows * drafts <= self.rows_per_chunk:
            return None
        if self.drafted.device.type != "cpu" or min(self.lengths.tolist()) < drafts:
            return None
        given = self.drafter_sampling_logits, self.verifier_sampling_logits
        logits = (self.drafter_logits, self.verifier_logits)
        flat = [None if one is None else one[:, :drafts].flatten(0, 1) for one in (*logits, *given)]
        return Laws.of(flat[0], flat[1], self.temperature, flat[2], flat[3])  # type: ignore[arg-type]

    @property
    def whole_context(self) -> Summary:
        """The context [B * T] of all positions; the place in the block is always known."""
        rows, drafts = self.drafted.shape
        given = () if self.context is None else self.context.items()
        columns = {name: column[:, :drafts].flatten(0, 1) for name, column in given}
        return Summary({"draft_position": torch.arange(drafts).repeat(rows), **columns})

    @property
    def rows_per_chunk(self) -> int:
        """Rows worked on at a time: as many as a cache holds, one at a large vocabulary."""
        elements = CHUNK_ELEMENTS if self.verifier_logits.device.type == "cpu" else 4 * CHUNK_ELEMENTS
        return max(1, elements // self.verifier_logits.shape[-1])

    def chunks(self, batch: Tensor, step: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions (batch [R], step [R]) in chunks; none where there are none."""
        if batch.numel():
            yield from zip(batch.split(self.rows_per_chunk), step.split(self.rows_per_chunk))

    def rows(self, batch: Tensor, step: Tensor) -> Laws:
        """Laws [R, V] at some positions; the drafter's are one-hot where it gives no law."""
        drafts = self.drafted.shape[1]
        if batch.numel() == 1 and self.whole is not None and int(step) < drafts:
            return self.whole.row(int(batch) * drafts + int(step))
        verifier = _pick(self.verifier_logits, batch, step)
        if self.drafter_logits is None:
            tokens = self.drafted[batch, step].unsqueeze(1)
            drafter = torch.full_like(verifier, -torch.inf).scatter_(1, tokens, 0.0)
        else:
            drafter = _pick(self.drafter_logits, batch, step)
        sampling = (
            None if logits is None else _pick(logits, batch, step)
            for logits in (self.drafter_sampling_logits, self.verifier_sampling_logits)
        )
        return Laws.of(drafter, verifier, self.temperature, *sampling)

    def verifier_row(self, batch: Tensor, step: Tensor) -> Laws:
        """Laws [R, V] of the verifier alone (in both places): what a bonus token is drawn from."""
        verifier, given = _pick(self.verifier_logits, batch, step), self.verifier_sampling_logits
        sampling = None if given is None else _pick(given, batch, step)
        return Laws.of(verifier, verifier, self.temperature, sampling, sampling)

    def context_at(self, batch: Tensor, step: Tensor) -> Summary:
        """The context [R] at some positions; the place in the block is always known."""
        columns = {} if self.context is None else {name: c[batch, step] for name, c in self.context.items()}
        return Summary({"draft_position": step, **columns})


def _pick(logits: Tensor, batch: Tensor, step: Tensor) -> Tensor:
    """Rows [R, V]; a single row is a view, since copying it costs as much as reading it."""
    if batch.numel() == 1 and logits.device.type == "cpu":
        return logits[int(batch), int(step)].unsqueeze(0)
    return logits[batch, step]


def _check_shape(name: str, logits: Tensor, rows: int, counts: tuple[int, ...], vocabulary: int) -> None:
    shape = tuple(logits.shape)
    if len(shape) == 3 and shape[-1] != vocabulary:
        raise InputError(
            f"vocabularies differ: {name} has {shape[-1]}, verifier_logits {vocabulary}; "
            "cut or pad both to the tokenizer's size"
        )
    if len(shape) != 3 or shape[0] != rows or shape[1] not in counts:
        wanted = " or ".join(f"[{rows}, {count}, V]" for count in counts)
        raise InputError(f"{name} has shape {list(shape)}; for this block it must be {wanted}")


def _check_lengths(lengths: Tensor | None, drafted: Tensor) -> Tensor:
    rows, drafts = drafted.shape
    if lengths is None:
        return torch.full((rows,), drafts, dtype=torch.int64, device=drafted.device)
    lengths = torch.as_tensor(lengths, device=drafted.device)
    if lengths.shape != (rows,) or lengths.dtype.is_floating_point:
        raise InputError(f"lengths has shape {list(lengths.shape)}; pass one integer per row, [{rows}]")
    if rows and not 0 <= int(lengths.min()) <= int(lengths.max()) <= drafts:
        raise InputError(f"lengths holds {lengths.tolist()}; each must lie in 0..{drafts}")
    return lengths.long()


def _check_context(context: Summary | None, rows: int, drafts: int) -> Summary | None:
    if context is None or not context.names:
        return None
    context = context if isinstance(context, Summary) else Summary(context)
    if tuple(context.shape) not in ((rows, drafts), (rows, drafts + 1)):
        raise InputError(
            f"context has leading shape {list(context.shape)}; it must be [{rows}, {drafts}] or "
            f"[{rows}, {drafts + 1}]"
        )
    return context
