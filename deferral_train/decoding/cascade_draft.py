"""A draft that came in pieces from several drafters, with the distribution of each token; put together when read.

B rows, M tokens of one piece, N of a draft, V vocabulary, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from deferral_train.decoding.proposing import Draft


@dataclass(frozen=True)
class Piece:
    """Tokens that one step added: row b has ``lengths[b]`` of them, from place ``starts[b]`` on.

    Attributes:
        source: the drafter that handed them on, 0 the largest; Max-Gram comes last.
        tokens: [B, M].
        decision: that drafter's decision logits [B, M, V]; None for Max-Gram.
        distribution: what the tokens were drawn from [B, M, V]; None for Max-Gram and at temperature 0: one-hots.
        hidden: that drafter's hidden states [B, M, D], where somebody reads them.
    """

    source: int
    starts: list[int]
    lengths: list[int]
    tokens: Tensor
    decision: Tensor | None = None
    distribution: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class Grown:
    """A draft for one reviewer as it grows.

    Attributes:
        counts: tokens of each row.
        ended: rows that draft no further.
        sources: who handed on each token of each row.
        missing: rows where Max-Gram had fewer tokens than it was asked for.
        device: of the tokens, where a draft without a piece is read.
    """

    counts: list[int]
    ended: list[bool]
    sources: list[list[int]]
    missing: list[bool]
    pieces: list[Piece] = field(default_factory=list)
    device: torch.device | None = None

    @classmethod
    def empty(cls, caps: list[int]) -> Grown:
        """Nothing yet; rows whose cap is 0 have ended."""
        rows = len(caps)
        return cls([0] * rows, [cap < 1 for cap in caps], [[] for _ in caps], [False] * rows)

    def add(self, piece: Piece) -> None:
        """Take in a piece behind what is there."""
        self.pieces.append(piece)
        for row, length in enumerate(piece.lengths):
            self.counts[row] += length
            self.sources[row] += [piece.source] * length

    def distributions(self, depth: int, vocabulary: int) -> Tensor | None:
        """q [B, depth, V], what the tokens were drawn from; None where all are Max-Gram's one-hots."""
        if all(piece.distribution is None for piece in self.pieces):
            return None
        distribution = self._zeros(depth, vocabulary)
        for piece in self.pieces:
            _place(
                distribution,
                piece,
                one_hots(piece.tokens, vocabulary) if piece.distribution is None else piece.distribution,
            )
        return distribution

    def probabilities(self, drafted: Tensor) -> Tensor:
        """At temperature 0: the probability that the drafter which handed on a token gives it, [B, N]."""
        found = torch.ones(drafted.shape, device=drafted.device)
        for piece in self.pieces:
            if piece.decision is not None:
                distribution = torch.softmax(piece.decision, dim=-1)
                _place(found, piece, distribution.gather(2, piece.tokens[..., None])[..., 0])
        return found

    def decisions(self, depth: int, vocabulary: int) -> Tensor:
        """Decision logits [B, depth, V] of the drafters that handed on the tokens; one-hots for Max-Gram's."""
        logits = self._zeros(depth, vocabulary)
        for piece in self.pieces:
            own = piece.decision
            _place(logits, piece, one_hots(piece.tokens, vocabulary).log_() if own is None else own)
        return logits

    def samplings(self, depth: int, vocabulary: int) -> Tensor:
        """Logits [B, depth, V] of the distributions that the tokens were really drawn from."""
        logits = self._zeros(depth, vocabulary)
        for piece in self.pieces:
            distribution = (
                one_hots(piece.tokens, vocabulary) if piece.distribution is None else piece.distribution
            )
            _place(logits, piece, distribution.log())
        return logits

    def hiddens(self, depth: int) -> Tensor | None:
        """Hidden states [B, depth, D] of the drafters that handed on the tokens, or None."""
        widths = [piece.hidden.shape[-1] for piece in self.pieces if piece.hidden is not None]
        if not widths:
            return None
        states = self._zeros(depth, widths[0])
        for piece in self.pieces:
            if piece.hidden is not None:
                _place(states, piece, piece.hidden)
        return states

    def _zeros(self, depth: int, width: int) -> Tensor:
        device = self.pieces[0].tokens.device if self.pieces else self.device
        return torch.zeros(len(self.counts), depth, width, device=device)


@dataclass
class CascadeDraft(Draft):
    """A draft whose distributions are put together only if somebody reads them.

    Attributes:
        grown: its pieces.
        places: T, or T + 1 for an exact bonus.
        vocabulary: V.
        explicit: whether tokens were drawn from other distributions than softmax(decision / temperature).
    """

    grown: Grown = field(default_factory=lambda: Grown.empty([]))
    places: int = 0
    vocabulary: int = 0
    explicit: bool = False

    @cached_property
    def columns(self) -> int:
        return self.places

    @cached_property
    def logits(self) -> Tensor:
        return self.grown.decisions(self.places, self.vocabulary)

    @cached_property
    def sampling(self) -> Tensor | None:
        return self.grown.samplings(self.places, self.vocabulary) if self.explicit else None

    @cached_property
    def hidden(self) -> Tensor | None:
        return self.grown.hiddens(self.places)


def one_hots(tokens: Tensor, vocabulary: int) -> Tensor:
    """[B, M, V] of tokens [B, M], float32."""
    distribution = torch.zeros(*tokens.shape, vocabulary, device=tokens.device)
    return distribution.scatter_(-1, tokens[..., None], 1.0)


def _place(whole: Tensor, piece: Piece, part: Tensor) -> None:
    """Put the tokens' part [B, M, ..] of a piece where they stand in the draft [B, N, ..]."""
    for row, (start, length) in enumerate(zip(piece.starts, piece.lengths)):
        if length:
            whole[row, start : start + length] = part[row, :length]
