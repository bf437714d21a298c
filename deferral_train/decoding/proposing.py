"""The drafting side of the loop: what proposes. ``speculative`` in generate.py lets the rule decide what stands of it.

A :class:`Proposer` writes a block of tokens behind every row's end and says which distribution each was drawn from;
that is all the verifier needs for exact verification, whoever the proposers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from deferral_train.decoding.cached_model import CachedModel
from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.distributions import Drafted, SamplingDistributions
from deferral_train.decoding.stopping import DraftStep, StopDrafting
from deferral_train.decoding.tokens import TokenRows, on_device


@dataclass
class Draft:
    """A proposed block. Distributions come in parts along the block and are put together only if somebody reads them.

    Attributes:
        tokens: [B, T] proposed tokens; row b proposes its first ``limits[b]``, or fewer where one of these ends it.
        limits: [B] on the host.
        decisions: the proposer's decision logits, [B, k, V] each, T columns in all, or T + 1 for an exact bonus.
        samplings: logits of the distributions that the tokens were really drawn from, in the same parts; None where
            that is softmax(decision / temperature).
        hiddens: the proposer's hidden states [B, k, D], in the same parts; None where nobody asks.
        drafted: what the host knows of ends within the block; None where it has not looked.
        calls: drafter passes made for each row; None for one per proposed token (and one for an exact bonus).
    """

    tokens: Tensor
    limits: list[int]
    decisions: Sequence[Tensor]
    samplings: Sequence[Tensor] | None = None
    hiddens: Sequence[Tensor] | None = None
    drafted: Drafted | None = None
    calls: list[int] | None = None

    @property
    def depth(self) -> int:
        """T, the most tokens that a row proposes."""
        return self.tokens.shape[1]

    @cached_property
    def columns(self) -> int:
        """Places that have a distribution: T, or T + 1 for an exact bonus."""
        return sum(part.shape[1] for part in self.decisions)

    @cached_property
    def lengths(self) -> Tensor | None:
        """``limits`` as a tensor [B]; None where every row proposes T tokens, at least one."""
        if min(self.limits) == self.depth > 0:
            return None
        return on_device(self.limits, self.tokens.device)

    @cached_property
    def logits(self) -> Tensor:
        """Decision logits [B, T (+1), V]."""
        return self._joined(self.decisions)

    @cached_property
    def sampling(self) -> Tensor | None:
        """Logits of the distributions that were drawn from [B, T (+1), V], or None."""
        return self._joined(self.samplings) if self.samplings else None

    @cached_property
    def hidden(self) -> Tensor | None:
        """Hidden states [B, T (+1), D], or None."""
        return self._joined(self.hiddens) if self.hiddens else None

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts along the block as one, where the tokens are: a drafter may live on another device."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return whole.to(self.tokens.device)


class Proposer(Protocol):
    """Proposes blocks for all running rows at once.

    Attributes:
        models: the models it runs; the loop tells them which rows grow and leave.
    """

    models: Sequence[CachedModel]

    def propose(self, limits: Sequence[int], exact: bool) -> Draft:
        """The next block.

        Args:
            limits: [B] most tokens for each row.
            exact: give the distribution of the place after the block too.
        """
        ...

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """The verifier has judged the latest block: proposed and emitted tokens per row."""
        ...


class ModelProposer:
    """One drafter, token by token.

    Drafts are not looked at on the host, which would wait for the device at every token: a row runs on behind its
    end, and the loop cuts it there. A stop rule, and processors that may see nothing but text that rows have, are
    what makes the host look.

    Args:
        drafter: the model.
        tokens, distributions, ends: of the call.
        stop: adaptive draft length, or None.
        generator: source of randomness.
    """

    def __init__(
        self,
        drafter: CachedModel,
        tokens: TokenRows,
        distributions: SamplingDistributions,
        ends: EndOfRow,
        stop: StopDrafting | None,
        generator: torch.Generator | None,
    ) -> None:
        self.drafter = drafter
        self.models: Sequence[CachedModel] = [drafter]
        self.tokens, self.distributions, self.ends = tokens, distributions, ends
        self.stop, self.generator = stop, generator
        self.watches = stop is not None or distributions.strict

    def propose(self, limits: Sequence[int], exact: bool) -> Draft:
        """Draft up to ``limits`` tokens, fewer where the stop rule says so."""
        depth = max(limits)
        if depth == 0 and not exact:
            return self._nothing()
        growing = _Growing(list(limits), [False] * len(limits))
        numbers: Tensor | None = None
        logits = self.drafter.feed()
        place = 0
        while True:
            self._take(growing, logits, place)
            if place == depth or growing.over:
                break
            if place == 0:
                device = growing.decisions[0].device
                numbers = self.distributions.numbers(len(limits), depth, self.generator, device)
            token = self._draw(growing, place, numbers)
            place += 1
            growing.over = place == depth or (self.watches and self._complete(growing, token, place))
            if growing.over and not exact:
                break
            logits = self.drafter.step(token[:, None])
        return Draft(
            self.tokens.window(0, place),
            [min(limit, place) for limit in growing.limits],
            growing.decisions,
            growing.samplings or None,
            growing.hiddens or None,
            growing.drafted(place) if self.watches else None,
        )

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """Passed on to the stop rule."""
        if self.stop is not None:
            self.stop.observe(proposed, accepted)

    def _take(self, growing: _Growing, logits: Tensor, place: int) -> None:
        """Take in the drafter's logits [B, 1, V] at ``place``."""
        if self.distributions.processors or self.stop is not None:  # what decides lives where the rows do
            logits = logits.to(self.tokens.device)
        drafted = growing.drafted(place) if self.watches else None
        decision = self.distributions.decision(logits, self.tokens, place, drafted)
        growing.decisions.append(decision)
        sampling = self.distributions.sampling(logits, decision, self.tokens, place, drafted)
        if sampling is not None:
            growing.samplings.append(sampling)
        if self.drafter.tap is not None:
            growing.hiddens.append(self.drafter.hidden(1))

    def _draw(self, growing: _Growing, place: int, numbers: Tensor | None) -> Tensor:
        """Draw the token [B] at ``place`` and write it behind each row's end."""
        sampling = growing.samplings[-1][:, 0] if growing.samplings else None
        number = None if numbers is None else numbers[:, place]
        decision = growing.decisions[-1][:, 0]
        column = self.tokens.column(place)
        if column is not None and column.device == decision.device:
            return self.distributions.draw(decision, sampling, number, column)
        token = self.distributions.draw(decision, sampling, number)
        self.tokens.write(place, token[:, None])
        return token

    def _complete(self, growing: _Growing, token: Tensor, drawn: int) -> bool:
        """True where no row wants more than ``drawn`` tokens; shortens the rows that end here."""
        asked = [token]
        if self.stop is not None:
            asked.append(self.stop.stops(self._step(growing, token, drawn - 1)).long())
        ids, *stops = torch.stack(asked).tolist()
        for row, ends in enumerate(self.ends.are_eos(ids)):
            if growing.limits[row] >= drawn and (ends or (stops and stops[0][row])):
                growing.limits[row], growing.ends[row] = drawn, ends
        return max(growing.limits) <= drawn

    def _step(self, growing: _Growing, token: Tensor, place: int) -> DraftStep:
        tokens = self.tokens
        return DraftStep(
            place=place,
            token=token,
            logits=growing.decisions[-1][:, 0],
            sampling=growing.samplings[-1][:, 0] if growing.samplings else None,
            temperature=self.distributions.temperature,
            hidden=growing.hiddens[-1][:, 0] if growing.hiddens else None,
            generated=[length - tokens.prompt_length for length in tokens.lengths],
            previous=lambda back: tokens.previous(back, place + 1)[:, place],
        )

    def _nothing(self) -> Draft:
        rows, device = len(self.tokens.rows), self.tokens.device
        empty = torch.empty(
            rows, 0, self.distributions.vocab_size or self.drafter.facts.vocab_size, device=device
        )
        nothing = torch.empty(rows, 0, dtype=torch.long, device=device)
        return Draft(nothing, [0] * rows, [empty], [empty] if self.distributions.shapes else None)


@dataclass
class _Growing:
    """The block while it is being drafted: one part per place; ``ends`` says which rows a drafted token ends."""

    limits: list[int]
    ends: list[bool]
    over: bool = False
    decisions: list[Tensor] = field(default_factory=list)
    samplings: list[Tensor] = field(default_factory=list)
    hiddens: list[Tensor] = field(default_factory=list)

    def drafted(self, place: int) -> Drafted:
        """The draft so far, once ``place`` tokens are drafted."""
        return Drafted([min(limit, place) for limit in self.limits], self.ends)
