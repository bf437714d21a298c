"""Runs a cascade of drafters: builds the draft of each reviewer from those below it, all rows at once.

The distributions of :mod:`deferral_train.decoding.drafting.review` travel with the tokens: the verifier is told what
each token was really drawn from. Source: cascade speculative drafting (Chen et al. 2024), Algorithm 1; batches,
sampling, key/value caches and the number of tokens per row are ours. A given text is a draft of one piece.

B rows, M tokens of one piece, N of a draft, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from deferral_train.decoding.cached_model import CachedModel
from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.distributions import Drafted, SamplingDistributions
from deferral_train.decoding.drafting.counts import ReviewCounts
from deferral_train.decoding.drafting.given import GivenDraft
from deferral_train.decoding.drafting.max_gram import MaxGramText
from deferral_train.decoding.drafting.plan import Plan
from deferral_train.decoding.drafting.review import (
    Review,
    review_greedy,
    review_sampled,
    reviewed_distribution,
)
from deferral_train.decoding.proposing import Draft
from deferral_train.decoding.tokens import TokenRows, on_device
from deferral_train.rules.distributions import lowest_argmax


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

    def drawn_from(self, vocabulary: int) -> Tensor:
        """q of the tokens, [B, M, V]: the distribution that they were drawn from."""
        return one_hots(self.tokens, vocabulary) if self.distribution is None else self.distribution


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
        return self._assembled(depth, vocabulary, lambda piece: piece.drawn_from(vocabulary))

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

        def logits(piece: Piece) -> Tensor:
            return one_hots(piece.tokens, vocabulary).log_() if piece.decision is None else piece.decision

        return self._assembled(depth, vocabulary, logits)

    def samplings(self, depth: int, vocabulary: int) -> Tensor:
        """Logits [B, depth, V] of the distributions that the tokens were really drawn from."""
        return self._assembled(depth, vocabulary, lambda piece: piece.drawn_from(vocabulary).log())

    def hiddens(self, depth: int) -> Tensor | None:
        """Hidden states [B, depth, D] of the drafters that handed on the tokens, or None."""
        widths = [piece.hidden.shape[-1] for piece in self.pieces if piece.hidden is not None]
        return self._assembled(depth, widths[0], lambda piece: piece.hidden) if widths else None

    def _assembled(self, depth: int, width: int, part: Callable[[Piece], Tensor | None]) -> Tensor:
        """A part [B, M, width] of each piece where its tokens stand in the draft, [B, depth, width]; 0 elsewhere."""
        device = self.pieces[0].tokens.device if self.pieces else self.device
        whole = torch.zeros(len(self.counts), depth, width, device=device)
        for piece in self.pieces:
            if (found := part(piece)) is not None:
                _place(whole, piece, found)
        return whole


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


class CascadeProposer:
    """The running side of a plan.

    Args:
        plan: who proposes how much to whom.
        models: the drafters, largest first.
        tokens, distributions, ends: of the call.
        prompts: ids of each row of the call, for Max-Gram; encoder ids of an encoder-decoder model.
        separate: whether generated text does not continue the prompt (encoder-decoder).
        generator: source of randomness.
    """

    def __init__(
        self,
        plan: Plan,
        models: Sequence[CachedModel],
        tokens: TokenRows,
        distributions: SamplingDistributions,
        ends: EndOfRow,
        prompts: Sequence[Sequence[int]],
        separate: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.plan, self.tokens, self.distributions, self.ends = plan, tokens, distributions, ends
        self.models: Sequence[CachedModel] = list(models)
        self.prompts, self.separate, self.generator = prompts, separate, generator
        self.counts = ReviewCounts(plan.drafters)
        self.passes = [
            [0] * plan.drafters for _ in tokens.final_lengths
        ]  # of each drafter, per row of the call
        self._texts: dict[int, MaxGramText] = {}
        self._known: dict[int, int] = {}  # generated tokens of each row that its text holds for good
        self._base: list[int] = []
        self._tails: list[list[int]] = []  # drafted tokens of each row up to where drafting has come
        self._calls: list[int] = []
        self._latest: Grown | None = None

    def propose(self, limits: Sequence[int], exact: bool) -> CascadeDraft:
        """The verifier's next draft, of at most ``limits[b]`` tokens."""
        tokens, rows = self.tokens, len(self.tokens.rows)
        self._base, self._calls = list(tokens.lengths), [0] * rows
        self._tails = [[] for _ in range(rows)]
        if self.plan.max_gram is not None:
            self._catch_up()
        assert self.distributions.vocab_size is not None
        grown = self._latest = self._draft_for(0, list(limits))
        grown.device = tokens.device
        depth, counts = max(grown.counts), list(grown.counts)
        if exact:
            self._look_ahead(grown)
        return CascadeDraft(
            tokens.window(0, depth),
            counts,
            (),
            calls=self._calls,
            drafted=Drafted(counts, self._ends(self._tails)),
            grown=grown,
            places=depth + int(exact),
            vocabulary=self.distributions.vocab_size,
            explicit=self.plan.one_hot_tail or self.plan.lenience > 1.0 or self.distributions.shapes,
        )

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """The verifier has judged the draft."""
        grown = self._latest
        if grown is not None:
            self.counts.add(0, grown.sources, grown.missing, accepted, range(len(accepted)))

    def _draft_for(self, reviewer: int, caps: list[int]) -> Grown:
        tokens, starts = self.tokens, list(self.tokens.lengths)
        rows, bottom, total = len(starts), self.plan.drafters, 0
        grown = Grown.empty(caps)
        for source in range(reviewer, bottom + 1):
            if not self.plan.k[reviewer][source]:
                continue
            total += self.plan.k[reviewer][source]
            goals = [min(total, cap) for cap in caps]
            while active := [
                row for row in range(rows) if not grown.ended[row] and grown.counts[row] < goals[row]
            ]:
                tokens.lengths = [start + count for start, count in zip(starts, grown.counts)]
                if source == bottom:
                    self._copy(grown, goals, active)
                    break
                self._step(source, grown, caps, active)
        tokens.lengths = starts
        return grown

    def _step(self, source: int, grown: Grown, caps: list[int], active: list[int]) -> None:
        """Drafter ``source`` reviews what those below it propose, and adds a token of its own."""
        tokens, model, running = self.tokens, self.models[source], set(active)
        here = list(tokens.lengths)
        room = [
            cap - done if row in running else 0 for row, (cap, done) in enumerate(zip(caps, grown.counts))
        ]
        inner = self._draft_for(source + 1, [max(0, left - 1) for left in room])
        depth = max(inner.counts)
        logits = model.feed(ahead=depth, keep=depth + 1).to(tokens.device)
        tails = [tail[begin - base :] for tail, begin, base in zip(self._tails, here, self._base)]
        place = Drafted(inner.counts, self._ends(tails))
        decision = self.distributions.decision(logits, tokens, 0, place)
        sampling = self.distributions.sampling(logits, decision, tokens, 0, place)
        drafted = tokens.window(0, depth)
        review, distribution = self._review(inner, drafted, decision, sampling)
        tokens.put(review.accepted, review.next_token)
        facts = torch.stack([review.accepted, review.next_token], dim=1)
        host = torch.cat([facts, tokens.window(0, depth + 1)], dim=1).tolist()
        accepted = [row[0] for row in host]
        self.counts.add(source + 1, inner.sources, inner.missing, accepted, active)
        lengths = [0] * len(here)
        for row in active:
            new = self._up_to_end(grown, row, host[row][2 : 3 + min(accepted[row], room[row] - 1)])
            lengths[row] = len(new)
            self._set_tail(row, here[row], new)
            self._calls[row] += 1
            self.passes[tokens.rows[row]][source] += 1
        hidden = model.hidden(depth + 1) if model.tap is not None else None
        written = tokens.window(0, depth + 1)
        grown.add(Piece(source, list(grown.counts), lengths, written, decision, distribution, hidden))
        tokens.lengths = [length + more for length, more in zip(here, lengths)]
        for one in self.models[source:]:
            one.settle()

    def _review(
        self, inner: Grown, drafted: Tensor, decision: Tensor, sampling: Tensor | None
    ) -> tuple[Review, Tensor | None]:
        lengths = on_device(inner.counts, drafted.device)
        lenience, depth = self.plan.lenience, drafted.shape[1]
        if self.distributions.temperature == 0.0:
            proposed = inner.probabilities(drafted) if lenience > 1.0 else None
            return review_greedy(drafted, proposed, decision, lengths, lenience), None
        own = self._sampling_distribution(decision, sampling)
        proposal = inner.distributions(depth, decision.shape[-1])
        review = review_sampled(drafted, proposal, own, lengths, lenience, self.generator)
        if lenience == 1.0 or not depth:
            return review, own
        dense = proposal if proposal is not None else one_hots(drafted, own.shape[-1])
        reviewed = reviewed_distribution(dense, own[:, :depth], lenience)
        inside = torch.arange(depth, device=drafted.device) < lengths[:, None]
        distribution = own.clone()
        distribution[:, :depth] = torch.where(inside[..., None], reviewed, own[:, :depth])
        return review, distribution

    def _look_ahead(self, grown: Grown) -> None:
        """The largest drafter's distribution behind the draft; no token is drawn from it, an exact bonus reads it."""
        tokens, model = self.tokens, self.models[0]
        tokens.lengths = [start + count for start, count in zip(self._base, grown.counts)]
        logits = model.feed().to(tokens.device)
        decision = self.distributions.decision(logits, tokens)
        distribution, best = None, lowest_argmax(decision)
        if self.distributions.temperature > 0.0:
            distribution = self._sampling_distribution(
                decision, self.distributions.sampling(logits, decision, tokens)
            )
        hidden = model.hidden(1) if model.tap is not None else None
        ones = [1] * len(self._base)
        grown.pieces.append(Piece(0, list(grown.counts), ones, best, decision, distribution, hidden))
        tokens.lengths = list(self._base)
        self._calls = [calls + 1 for calls in self._calls]
        for row in tokens.rows:
            self.passes[row][0] += 1

    def _sampling_distribution(self, decision: Tensor, sampling: Tensor | None) -> Tensor:
        return torch.softmax(
            decision / self.distributions.temperature if sampling is None else sampling, dim=-1
        )

    def _ends(self, texts: Sequence[Sequence[int]]) -> list[bool]:
        """Which drafts end their row."""
        return [bool(text) and self.ends.are_eos(text[-1:])[0] for text in texts]

    def _copy(self, grown: Grown, goals: list[int], active: list[int]) -> None:
        """Max-Gram fills up rows to their goals, as far as it can."""
        tokens = self.tokens
        proposals: list[list[int]] = [[] for _ in goals]
        for row in active:
            wanted = goals[row] - grown.counts[row]
            text = self._texts[tokens.rows[row]]
            start = tokens.lengths[row]
            drafted = self._tails[row][: start - self._base[row]]
            text.follow(self._known[tokens.rows[row]], drafted)
            proposals[row] = self._up_to_end(grown, row, text.propose(wanted))
            grown.missing[row] = not grown.ended[row] and len(proposals[row]) < wanted
            self._set_tail(row, start, proposals[row])
        width = max(len(proposal) for proposal in proposals)
        block = torch.tensor(
            [proposal + [0] * (width - len(proposal)) for proposal in proposals],
            dtype=torch.long,
            device=tokens.device,
        ).reshape(len(proposals), width)
        tokens.write(0, block)
        lengths = [len(proposal) for proposal in proposals]
        grown.add(Piece(self.plan.drafters, list(grown.counts), lengths, block))

    def _up_to_end(self, grown: Grown, row: int, new: list[int]) -> list[int]:
        """``new`` up to the first end of sequence, behind which nothing is drafted."""
        for place, ends in enumerate(self.ends.are_eos(new)):
            if ends:
                grown.ended[row] = True
                return new[: place + 1]
        return new

    def _set_tail(self, row: int, start: int, new: list[int]) -> None:
        tail = self._tails[row]
        del tail[start - self._base[row] :]
        tail += new

    def _catch_up(self) -> None:
        """Every row's text takes in what has been emitted since."""
        tokens = self.tokens
        for row in tokens.rows:
            if row not in self._texts and self.plan.max_gram is not None:
                self._texts[row] = self.plan.max_gram.read(self.prompts[row], self.separate)
                self._known[row] = 0
        generated = [length - tokens.prompt_length for length in tokens.lengths]
        behind = max(count - self._known[row] for row, count in zip(tokens.rows, generated))
        new = tokens.window(behind, 0).tolist() if behind else [[] for _ in generated]
        for row, count, tail in zip(tokens.rows, generated, new):
            known = self._known[row]
            self._texts[row].follow(known, tail[behind - (count - known) :])
            self._known[row] = count


class GivenProposer:
    """The running side of a given draft.

    Args:
        given: a text for each row of the call.
        tokens: of the call.
        vocab_size: columns of the logits.
    """

    def __init__(self, given: GivenDraft, tokens: TokenRows, vocab_size: int) -> None:
        self.given, self.tokens, self.vocab_size = given, tokens, vocab_size
        self.models: Sequence[CachedModel] = []

    def propose(self, limits: Sequence[int], exact: bool) -> CascadeDraft:
        """The texts of rows that have emitted nothing yet; they are one-hots.

        Up to the last place that a row may emit, which limits leave to the verifier: nothing is saved there, but the
        rule leans towards the text at every place.
        """
        tokens = self.tokens
        texts = [
            list(self.given.texts[row][: limit + 1]) if length == tokens.prompt_length else []
            for row, length, limit in zip(tokens.rows, tokens.lengths, limits)
        ]
        counts = [len(text) for text in texts]
        depth = max(counts)
        host = [text + [0] * (depth - len(text)) for text in texts]
        block = torch.tensor(host, dtype=torch.long, device=tokens.device).reshape(len(host), depth)
        tokens.write(0, block)
        grown = Grown.empty(counts)
        grown.add(Piece(0, list(grown.counts), counts, block))
        return CascadeDraft(
            block,
            counts,
            (),
            calls=[0] * len(host),
            drafted=Drafted(counts, [False] * len(counts)),
            grown=grown,
            places=depth,
            vocabulary=self.vocab_size,
            explicit=True,
        )

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """Nothing to learn: what did not stand is not proposed again."""
