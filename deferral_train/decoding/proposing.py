"""The drafting side of the loop: what proposes. :mod:`deferral_train.decoding.loop` decides what becomes of it.

A :class:`Proposer` writes a block of tokens behind every row's end and says which law each was drawn from; that
is all the verifier needs for exact verification, whoever the proposers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.laws import SamplingLaws
from deferral_train.decoding.stepper import Stepper
from deferral_train.decoding.stopping import DraftStep, StopDrafting
from deferral_train.decoding.tokens import TokenRows, on_device


@dataclass
class Draft:
    """A proposed block. Laws come in parts along the block and are put together only if somebody reads them.

    Attributes:
        tokens: [B, T] proposed tokens; row b proposes its first ``proposed[b]``.
        proposed: [B] int64, or a list where the host knows already.
        decisions: the proposer's decision logits, [B, k, V] each, T columns in all, or T + 1 for an exact bonus.
        samplings: logits of the laws that the tokens were really drawn from, in the same parts; None where that is
            softmax(decision / temperature).
        hiddens: the proposer's hidden states [B, k, D], in the same parts; None where nobody asks.
        on_host: the tokens as lists, where the host knows them already.
        calls: drafter passes made for each row; None for one per proposed token (and one for an exact bonus).
    """

    tokens: Tensor
    proposed: Tensor | list[int]
    decisions: Sequence[Tensor]
    samplings: Sequence[Tensor] | None = None
    hiddens: Sequence[Tensor] | None = None
    on_host: list[list[int]] | None = None
    calls: list[int] | None = None

    @property
    def depth(self) -> int:
        """T, the most tokens that a row proposes."""
        return self.tokens.shape[1]

    @cached_property
    def columns(self) -> int:
        """Places that have a law: T, or T + 1 for an exact bonus."""
        return sum(part.shape[1] for part in self.decisions)

    @cached_property
    def lengths(self) -> Tensor:
        """``proposed`` as a tensor [B]."""
        if isinstance(self.proposed, Tensor):
            return self.proposed
        return on_device(self.proposed, self.tokens.device)

    @cached_property
    def logits(self) -> Tensor:
        """Decision logits [B, T (+1), V]."""
        return _joined(self.decisions)

    @cached_property
    def sampling(self) -> Tensor | None:
        """Logits of the laws that were drawn from [B, T (+1), V], or None."""
        return _joined(self.samplings) if self.samplings else None

    @cached_property
    def hidden(self) -> Tensor | None:
        """Hidden states [B, T (+1), D], or None."""
        return _joined(self.hiddens) if self.hiddens else None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class Proposer(Protocol):
    """Proposes blocks for all running rows at once.

    Attributes:
        steppers: the models it runs; the loop tells them which rows grow, leave and come in.
    """

    steppers: Sequence[Stepper]

    def propose(self, limits: Sequence[int], exact: bool) -> Draft:
        """The next block.

        Args:
            limits: [B] most tokens for each row.
            exact: give the law of the place after the block too.
        """
        ...

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """The verifier has judged the latest block: proposed and emitted tokens per row."""
        ...


class ModelProposer:
    """One drafter, token by token.

    On a CPU drafting ends as soon as no row wants more; on an accelerator that would wait for the device, so
    that rows run on past their end and the surplus is cut afterwards.

    Args:
        drafter: its stepper.
        tokens, laws, ends: of the call.
        stop: adaptive draft length, or None.
        generator: source of randomness.
    """

    def __init__(
        self,
        drafter: Stepper,
        tokens: TokenRows,
        laws: SamplingLaws,
        ends: EndOfRow,
        stop: StopDrafting | None,
        generator: torch.Generator | None,
    ) -> None:
        self.drafter = drafter
        self.steppers: Sequence[Stepper] = [drafter]
        self.tokens, self.laws, self.ends = tokens, laws, ends
        self.stop, self.generator = stop, generator
        self.watches = stop is not None or tokens.device.type == "cpu"

    def propose(self, limits: Sequence[int], exact: bool) -> Draft:
        """Draft up to ``limits`` tokens, fewer where a row ends or the stop rule says so."""
        depth = max(limits)
        if depth == 0 and not exact:
            return self._nothing()
        growing = _Growing(list(limits))
        logits = self.drafter.feed()
        place = 0
        while True:
            self._take(growing, logits, place)
            if place == depth or growing.over:
                break
            token = self._draw(growing, place)
            place += 1
            growing.over = place == depth or (self.watches and self._complete(growing, token, place))
            if growing.over and not exact:
                break
            logits = self.drafter.step(token[:, None])
        return self._finished(growing, place)

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """Passed on to the stop rule."""
        if self.stop is not None:
            self.stop.observe(proposed, accepted)

    def _take(self, growing: _Growing, logits: Tensor, place: int) -> None:
        """Take in the drafter's logits [B, 1, V] at ``place``."""
        decision = self.laws.decision(logits, self.tokens, place)
        growing.decisions.append(decision)
        sampling = self.laws.sampling(logits, decision, self.tokens, place)
        if sampling is not None:
            growing.samplings.append(sampling)
        if self.drafter.tap is not None:
            growing.hiddens.append(self.drafter.tap.last(1))

    def _draw(self, growing: _Growing, place: int) -> Tensor:
        """Draw the token [B] at ``place`` and write it behind each row's end."""
        sampling = growing.samplings[-1][:, 0] if growing.samplings else None
        token = self.laws.draw(growing.decisions[-1][:, 0], sampling, self.generator)
        if self.watches:
            growing.drawn.append(token.tolist())
        self.tokens.write(place, token[:, None])
        return token

    def _complete(self, growing: _Growing, token: Tensor, drawn: int) -> bool:
        """Whether no row wants more than ``drawn`` tokens; shortens the rows that end here."""
        ended = self.ends.are_eos(growing.drawn[-1])
        if self.stop is not None:
            stopped = self.stop.stops(self._step(growing, token, drawn - 1)).tolist()
            ended = [over or stop for over, stop in zip(ended, stopped)]
        if True in ended:
            growing.limits = [
                min(limit, drawn) if over else limit for limit, over in zip(growing.limits, ended)
            ]
        return max(growing.limits) <= drawn

    def _step(self, growing: _Growing, token: Tensor, place: int) -> DraftStep:
        tokens = self.tokens
        return DraftStep(
            place=place,
            token=token,
            logits=growing.decisions[-1][:, 0],
            sampling=growing.samplings[-1][:, 0] if growing.samplings else None,
            temperature=self.laws.temperature,
            hidden=growing.hiddens[-1][:, 0] if growing.hiddens else None,
            generated=[length - tokens.prompt_length for length in tokens.lengths],
            previous=lambda back: tokens.previous(back, place + 1)[:, place],
        )

    def _finished(self, growing: _Growing, drawn: int) -> Draft:
        """The block, each row cut behind its first end of sequence."""
        tokens = self.tokens.window(0, drawn)
        limits = [min(limit, drawn) for limit in growing.limits]
        proposed: Tensor | list[int] = limits
        if not self.watches:
            ends = self.ends.is_eos(tokens)
            first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, drawn) if drawn else 0
            proposed = on_device(limits, tokens.device).clamp(max=first)
        return Draft(
            tokens,
            proposed,
            growing.decisions,
            growing.samplings or None,
            growing.hiddens or None,
            [list(row) for row in zip(*growing.drawn)] if growing.drawn else None,
        )

    def _nothing(self) -> Draft:
        rows, device = len(self.tokens.rows), self.tokens.device
        empty = torch.empty(rows, 0, self.drafter.vocab_size, device=device)
        nothing = torch.empty(rows, 0, dtype=torch.long, device=device)
        return Draft(nothing, [0] * rows, [empty], [empty] if self.laws.shapes else None)


@dataclass
class _Growing:
    """The block while it is being drafted: one part per place."""

    limits: list[int]
    over: bool = False
    decisions: list[Tensor] = field(default_factory=list)
    samplings: list[Tensor] = field(default_factory=list)
    hiddens: list[Tensor] = field(default_factory=list)
    drawn: list[list[int]] = field(default_factory=list)
