"""A stepper whose passes over a few columns have static shapes (see :mod:`deferral_train.decoding.compiled`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.compiled import StaticModel
from deferral_train.decoding.hidden import HiddenTap, tap_hidden
from deferral_train.decoding.static_shape import Shape
from deferral_train.decoding.static_shelf import lent
from deferral_train.decoding.static_support import NotStaticError, reason_against
from deferral_train.decoding.stepper import Stepper
from deferral_train.decoding.tokens import TokenRows, on_device
from deferral_train.errors import InputError


@dataclass(frozen=True)
class Work:
    """What one model of a call has to do, whatever steps it.

    Attributes:
        encoder: states [R, E, D] and mask [R, E] or None of all rows of the call; None for decoder-only models.
        hidden: whether its hidden states are read.
        passes: (columns taken in, logits given) of the passes that recur.
    """

    model: Any
    encoder: tuple[Tensor, Tensor | None] | None
    hidden: bool
    passes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Room:
    """Sizes of the ordinary caches: columns allocated at first, margin of sliding windows, vocabulary."""

    capacity: int
    margin: int | None
    vocab_size: int


class StaticStepper(Stepper):
    """A :class:`Stepper` over built passes; prompts are fed by an ordinary one and copied into the slots.

    Args:
        work, tokens, room: as of the call.
        static: the built passes, lent for the call.
    """

    admits_exchange = False  # slots are free as they are

    def __init__(self, work: Work, tokens: TokenRows, room: Room, static: StaticModel) -> None:
        # Not Stepper.__init__: there is no cache of one row after the other here, nor encoder states to select.
        self.model, self.tokens, self.static = work.model, tokens, static
        self.vocab_size = room.vocab_size
        self.passes = 0
        self._work, self._room = work, room
        self.tap = HiddenTap() if work.hidden else None
        self._start(tokens)

    def _start(self, group: TokenRows) -> None:
        """No row has been fed yet; row b gets slot b."""
        self._empty = True
        self._take_slots(list(range(len(group.rows))))
        self.valid = [0] * len(group.rows)

    def _take_slots(self, slots: list[int]) -> None:
        self.slots, self._index = slots, on_device(slots, self.tokens.device)

    def feed(self, ahead: int = 0, keep: int = 1) -> Tensor:
        """As :meth:`Stepper.feed`; a pass is as wide as one that was built, and feeds older tokens again to fill it."""
        if self._empty:
            return self._feed_prompts(ahead, keep)
        lengths = self.tokens.lengths
        needed = ahead + max(length - min(valid, length - 1) for length, valid in zip(lengths, self.valid))
        widest = max(self._work.passes)
        while needed > widest[0]:  # a row lags behind by more than one pass takes in
            self._pass([length + ahead - needed for length in lengths], *widest)
            needed -= widest[0]
        width, given = min(one for one in self._work.passes if one[0] >= needed and one[1] >= keep)
        self.valid = [length + ahead for length in lengths]
        return self._pass([length + ahead - width for length in lengths], width, given)[:, -keep:]

    def step(self, newest: Tensor, keep: int = 1) -> Tensor:
        """As :meth:`Stepper.step`; the host only starts it and waits for nothing."""
        single = self.static.buffers[1]
        single.ids.index_copy_(0, self._index, newest)
        self.valid = [valid + 1 for valid in self.valid]
        logits = self._run(1, 1)
        single.columns.add_(1)
        return logits

    def _pass(self, starts: Sequence[int], width: int, keep: int) -> Tensor:
        """Feed ``width`` columns from ``starts[b]`` on; where that is before a row's first, its first again."""
        places = torch.zeros(self.static.shape.slots, width + 1, dtype=torch.long)
        first = torch.tensor(starts)[:, None]
        places[self.slots] = (first + torch.arange(width + 1)[None]).clamp_(min=0)
        columns = on_device(places, self.tokens.device)
        inputs = self.static.buffers[width]
        mine = columns.index_select(0, self._index)[:, :width]
        inputs.ids.index_copy_(0, self._index, self.tokens.ids[self.tokens.index[:, None], mine])
        inputs.columns.copy_(columns[:, :width])
        logits = self._run(width, keep)
        if 1 in self.static.buffers:
            self.static.buffers[1].columns.copy_(columns[:, width:])
        return logits

    def _run(self, width: int, keep: int) -> Tensor:
        """Logits [B, keep, V] of the running rows; a copy, for the next pass overwrites the original."""
        logits = self.static.run(self.model, width, keep)
        self.passes += 1
        if self.tap is not None and self.static.hidden is not None:
            self.tap.states = self.static.hidden.index_select(0, self._index)
        return logits.index_select(0, self._index)[..., : self.vocab_size].float()

    def _feed_prompts(self, ahead: int, keep: int) -> Tensor:
        """The first pass over the running rows."""
        other = self._ordinary(self.tokens)
        logits = other.feed(ahead, keep)
        self._load(other, self.slots)
        self.valid, self._empty = list(other.valid), False
        if 1 in self.static.buffers:
            following = on_device(other.fed, self.tokens.device)[:, None]
            self.static.buffers[1].columns.zero_().index_copy_(0, self._index, following)
        if self.tap is not None:
            self.tap.states = self.static.tap.states
        return logits

    def _ordinary(self, group: TokenRows) -> Stepper:
        room = self._room
        return Stepper(
            self.model, group, room.capacity, room.margin, room.vocab_size, self._work.encoder
        )  # fmt: skip

    def _load(self, other: Stepper, slots: Sequence[int]) -> None:
        """Copy what another stepper has fed into these slots."""
        static, index = self.static, on_device(slots, self.tokens.device)
        static.cache.load(other.cache, slots, other.fed)
        static.pads[index] = on_device(other.tokens.row_pads, self.tokens.device)
        if static.cross is not None and other.encoder is not None:
            static.cross.load(other.past.cross_attention_cache, index)
            outputs, mask = other.encoder
            static.show_states(index, outputs[0].shape[1], mask)
        self.passes += other.passes

    def keep_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Finished rows have left; their slots are free."""
        self._take_slots([self.slots[row] for row in rows])
        self.valid = [self.valid[row] for row in rows]

    def join(self, group: TokenRows) -> None:
        """New rows come in: their prompts are fed in an ordinary pass and copied into free slots."""
        free = [slot for slot in range(self.static.shape.slots) if slot not in self.slots][: len(group.rows)]
        self._take_slots(self.slots + free)
        if self._empty:
            self.valid += [0] * len(group.rows)
            return
        other = self._ordinary(group)
        other.feed()
        self._load(other, free)
        # The newest token of every row is fed with the next block.
        self.valid += [fed - 1 for fed in other.fed]

    def start_over(self, group: TokenRows) -> None:
        """No row runs: the new ones begin in empty slots."""
        self._start(group)

    def joined(self) -> None:
        """Nothing to do: slots hold what rows need."""


def _ordinary(stack: contextlib.ExitStack, work: Work, tokens: TokenRows, room: Room) -> Stepper:
    tap = stack.enter_context(tap_hidden(work.model, work.hidden))
    return Stepper(
        work.model, tokens, room.capacity, room.margin, room.vocab_size, work.encoder, tap
    )  # fmt: skip


def _static(
    stack: contextlib.ExitStack, work: Work, tokens: TokenRows, room: Room, backend: str
) -> StaticStepper:
    reason = reason_against(work.model)
    if reason is not None:
        raise NotStaticError(reason)
    states = 0 if work.encoder is None else work.encoder[0].shape[1]
    shape = Shape.around(tokens.at_once, tokens.ids.shape[1], states, backend, work.hidden, work.passes)
    static = stack.enter_context(lent(work.model, shape, lambda built: prove(work, room, built)))
    return StaticStepper(work, tokens, room, static)


def prove(work: Work, room: Room, static: StaticModel) -> None:
    """Compare the built passes with the model's own on two rows of unlike padding and length.

    What a model makes of masks and positions is its own affair: one that builds them from something else (biases from
    a mask [B, L], for example) shows here.

    Raises:
        NotStaticError: the logits differ by more than rounding.
    """
    model, rows = work.model, min(2, static.shape.slots)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(room.vocab_size, (rows, 7), generator=generator).to(model.device)
    encoder = work.encoder
    if encoder is not None:
        states = torch.randn(rows, 3, encoder[0].shape[2], generator=generator).to(encoder[0])
        encoder = states, (torch.tensor([[1, 1, 1], [1, 1, 0]])[:rows]).to(model.device)
    padding = (
        None if encoder is not None else torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])[:rows].to(model.device)
    )
    found = []
    for kind in (Stepper, StaticStepper):
        tokens = TokenRows(ids[:, :5], padding, max_length=8, num_draft_tokens=1, pad_token_id=0)
        stepper = (
            Stepper(model, tokens, 8, room.margin, room.vocab_size, encoder)
            if kind is Stepper
            else StaticStepper(replace(work, encoder=encoder), tokens, room, static)
        )
        stepper.feed()
        tokens.write(0, ids[:, 5:])
        tokens.extend([2, 1][:rows])
        stepper.settle()
        found.append(stepper.feed())
    off = float((found[0] - found[1]).square().mean().sqrt() / found[0].std())
    exact = torch.get_float32_matmul_precision() == "highest"  # else float32 products are rounded to 10 bits
    tolerance = (1e-3 if exact else 1e-2) if model.dtype in (torch.float32, torch.float64) else 0.1
    if not off <= tolerance:
        raise NotStaticError(f"gives other logits in static shapes (off by {off:.2g} of their deviation)")


def suits(device: torch.device) -> bool:
    """Whether static shapes pay by themselves: where launching kernels costs more than a small pass computes."""
    return device.type == "cuda"


def stepper_for(
    stack: contextlib.ExitStack, work: Work, tokens: TokenRows, room: Room, compile: str
) -> tuple[Stepper, str]:
    """A stepper for one model of a call, lent or hooked until ``stack`` closes, and how its passes run, in words.

    Args:
        compile: see :data:`~deferral_train.decoding.static_support.COMPILE`; ``auto`` takes static shapes on CUDA, and
            ordinary passes where they do not work.

    Raises:
        InputError: static shapes were asked for by name and do not work.
    """
    wanted = "static" if compile == "auto" and suits(tokens.device) else compile
    if wanted in ("auto", "off"):
        return _ordinary(stack, work, tokens, room), "dynamic"
    if not work.passes:
        return _ordinary(stack, work, tokens, room), "dynamic: its passes have no fixed width here"
    try:
        stepper = _static(stack, work, tokens, room, wanted)
        return stepper, stepper.static.description
    except NotStaticError as error:
        if compile != "auto":
            name = type(work.model).__name__
            raise InputError(f"compile={compile!r}: {name} {error}; use compile='auto' or 'off'") from error
        return _ordinary(stack, work, tokens, room), f"dynamic: {error}"
