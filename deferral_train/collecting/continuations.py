"""Finish texts: the verifier goes on behind a prefix in which one token was put in another's place.

Here by transformers; a serving engine does the same in :mod:`deferral_train.collecting.served`. No prefix is run again:
the pass over the path's texts leaves a cache; a branch starts from a copy of its own row, cut before its place, and the
encoder's states. Branches that begin at the same column run together, whatever prompt they belong to, so that no row is
padded; rows that have ended leave the batch. R branches of one group, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from deferral_train.collecting.scoring import Past
from deferral_train.collecting.substitute import cut_cache
from deferral_train.rules.distributions import lowest_argmax

ENDED_SHARE = 0.25  # of a batch: then the rows that go on are copied together


@dataclass(frozen=True)
class Branch:
    """A place of a text, and the token to go on from.

    Attributes:
        row: number of the text in the batch.
        place: of the token among those that follow the prompt.
        token: what stands there.
        sample: number of the continuation; 0 at temperature 0.
    """

    row: int
    place: int
    token: int
    sample: int = 0


class NextToken(Protocol):
    """How the next token is chosen from the verifier's logits."""

    @property
    def temperature(self) -> float:
        """0 where the choice is greedy."""

    def __call__(self, logits: Tensor, branches: Sequence[Branch], steps: int) -> Tensor:
        """Next token of each row [R], from logits [R, V] of branches that read so many tokens from their own on."""

    def numbers(self, branch: Branch, steps: int) -> list[float]:
        """The uniform numbers that a branch's first so many tokens behind its own are drawn with; none if greedy."""


class Greedy:
    """The lowest argmax: what the verifier says at temperature 0."""

    temperature = 0.0

    def __call__(self, logits: Tensor, branches: Sequence[Branch], steps: int) -> Tensor:
        return lowest_argmax(logits)

    def numbers(self, branch: Branch, steps: int) -> list[float]:
        return []


@dataclass(frozen=True)
class PathTexts:
    """Texts of a batch that branches leave, and what the verifier's pass over them left.

    Attributes:
        texts: tokens that follow each prompt.
        prompts: token ids of each prompt.
        starts: columns of the decoder's input before each text's first token.
        past: keys and values of every column; None where a serving engine finishes the texts.
    """

    texts: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    starts: Sequence[int]
    past: Past | None


@dataclass
class Tally:
    """Counts of generated text: ``texts`` that went on behind a branch, and their ``tokens``."""

    texts: int = 0
    tokens: int = 0


class Finisher(Protocol):
    """Something that has the verifier go on behind branches."""

    def finish(
        self, path: PathTexts, branches: Sequence[Branch], choice: NextToken
    ) -> dict[Branch, list[int]]:
        """Each branch's finished text: the path's tokens before its place, its own token, and what follows.

        Args:
            path: texts that the branches leave.
            branches: without repetition.
            choice: of every next token.
        """


@dataclass(frozen=True)
class Ends:
    """Where a text ends.

    Attributes:
        eos_ids: tokens that end it.
        max_new_tokens: most tokens of it.
    """

    eos_ids: frozenset[int]
    max_new_tokens: int

    def begin(
        self, path: PathTexts, branches: Sequence[Branch]
    ) -> tuple[dict[Branch, list[int]], list[Branch]]:
        """Each branch's text up to its own token, and the branches that go on behind it."""
        begun = {one: [*path.texts[one.row][: one.place], one.token] for one in branches}
        open_ = [
            one for one in branches if one.token not in self.eos_ids and len(begun[one]) < self.max_new_tokens
        ]
        return begun, open_


@dataclass(frozen=True)
class Verifier:
    """The model that finishes texts by transformers, see :class:`Finisher`.

    Attributes:
        model: the verifier.
        vocab_size: columns of its logits that are tokens.
        ends: where a text ends.
        rows: most branches that run together.
        tally: counts what is written.
    """

    model: Any
    vocab_size: int
    ends: Ends
    rows: int = 256
    tally: Tally = field(default_factory=Tally)

    def finish(
        self, path: PathTexts, branches: Sequence[Branch], choice: NextToken
    ) -> dict[Branch, list[int]]:
        """As :meth:`Finisher.finish`."""
        finished, open_ = self.ends.begin(path, branches)
        for group in _groups(path, open_, self.rows):
            for one, tokens in zip(group, _continue(self, path, group, choice)):
                finished[one] += tokens
                self.tally.texts += 1
                self.tally.tokens += len(tokens)
        return finished


def _groups(path: PathTexts, branches: Sequence[Branch], most: int) -> Iterator[list[Branch]]:
    """Branches of one column, at most ``most`` together; those of long texts first, which end about together."""

    def column(one: Branch) -> int:
        return path.starts[one.row] + one.place

    group: list[Branch] = []
    for one in sorted(branches, key=lambda b: (column(b), -len(path.texts[b.row]), b.row, b.token, b.sample)):
        if group and (column(group[0]) != column(one) or len(group) == most):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _continue(
    verifier: Verifier, path: PathTexts, group: Sequence[Branch], choice: NextToken
) -> list[list[int]]:
    """Tokens after each branch's own, up to and with the end of sequence."""
    assert path.past is not None
    device = verifier.model.device
    first = group[0]
    rows = torch.tensor([one.row for one in group], device=device)
    running = _Running(verifier, path.past, rows, path.starts[first.row] + first.place)
    written: list[list[int]] = [[] for _ in group]
    at = list(range(len(group)))  # which branch each row of the batch is
    places = [one.place for one in group]
    tokens = torch.tensor([one.token for one in group], device=device)
    ended = [False] * len(group)
    step = 0
    while at:
        step += 1
        logits = running.step(tokens)
        tokens = choice(logits, [group[number] for number in at], step)
        for number, token in zip(at, tokens.tolist()):
            if not ended[number]:
                written[number].append(token)
                full = places[number] + 1 + len(written[number]) >= verifier.ends.max_new_tokens
                ended[number] = full or token in verifier.ends.eos_ids
        keep = [row for row, number in enumerate(at) if not ended[number]]
        if not keep or len(at) - len(keep) >= ENDED_SHARE * len(at):
            chosen = torch.tensor(keep, device=device, dtype=torch.long)
            at = [at[row] for row in keep]
            if at:
                running.keep(chosen)
                tokens = tokens.index_select(0, chosen)
    return written


class _Running:
    """A batch of rows that all stand at one column, one token at a time."""

    def __init__(self, verifier: Verifier, past: Past, rows: Tensor, column: int) -> None:
        self.model, self.vocab_size = verifier.model, verifier.vocab_size
        self.cache = cut_cache(past, rows, column)
        self.encoder = None if past.encoder is None else past.encoder.index_select(0, rows)
        self.mask = None if past.encoder_mask is None else past.encoder_mask.index_select(0, rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [R, V] once every row has read its token [R]."""
        arguments: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if self.encoder is not None:
            arguments |= {
                "decoder_input_ids": tokens[:, None],
                "encoder_outputs": BaseModelOutput(last_hidden_state=self.encoder),
                "attention_mask": self.mask,
            }
        else:
            arguments["input_ids"] = tokens[:, None]
        logits: Tensor = self.model(**arguments).logits[:, -1, : self.vocab_size]
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self.cache.batch_select_indices(rows)
        self.encoder = None if self.encoder is None else self.encoder.index_select(0, rows)
        self.mask = None if self.mask is None else self.mask.index_select(0, rows)
