"""Counts the passes that a plan would have taken on texts that are there, by replaying them token for token.

At temperature 0 a drafted token counts only while everything before it is what was emitted, so that each drafter's
next token after each prefix of the emitted text decides every accepted length: exact under ``lossless`` for any plan
with lenience 1, with no assumption on how acceptances depend on each other. The work behind a draft's first wrong
token is approximated: it goes on as if the wrong token had been the emitted one, and ends early with a chance that
:func:`fit_ending` finds. Under a lossy rule the text itself depends on the plan, which says where the verifier's bonus
tokens fall: exact for the plan that wrote the text, an estimate for others. Ours; the speed model of the sources is
:mod:`deferral_train.decoding.drafting.speed`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.decoding.drafting.plan import Plan
from deferral_train.errors import InputError

UNKNOWN = -1  # a token of which only is known that it differs from the emitted one
_END = -2  # a drafter's end of sequence behind a wrong token
_STEPS = 12  # halvings in the search of fit_ending


@dataclass(frozen=True)
class Path:
    """An emitted text of n tokens, and what each drafter would hand on at each of its places.

    Attributes:
        prompt: ids that Max-Gram reads; of the encoder for an encoder-decoder model.
        tokens: [n] the emitted ids, end of sequence included; a list.
        guesses: per drafter, largest first, [n] its next token after the tokens before; :data:`UNKNOWN` is allowed.
        stands: per drafter [n], whether the verifier lets that token stand.
        limit: most tokens that could have been emitted.
        separate: whether the text does not continue the prompt (encoder-decoder).
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    guesses: Sequence[Sequence[int]]
    stands: Sequence[Sequence[bool]]
    limit: int
    separate: bool = False
    _copied: dict[Any, list[list[int]]] = field(default_factory=dict, repr=False, compare=False)

    def copies(self, max_gram: MaxGram, most: int) -> list[list[int]]:
        """Max-Gram's proposals at each place, up to ``most`` tokens; a shorter proposal begins a longer one."""
        if (max_gram, most) not in self._copied:
            found = self._copied[max_gram, most] = []
            reader = max_gram.read(self.prompt, self.separate)
            for at, token in enumerate(self.tokens):
                found.append(reader.propose(most))
                reader.follow(at, [token])
        return self._copied[max_gram, most]


@dataclass(frozen=True)
class Work:
    """Passes that one text took.

    Attributes:
        tokens: emitted. calls: of the verifier. passes: of each drafter.
        proposals: of Max-Gram.
        widths: per model, the verifier first: passes by the number of tokens that went through them.
    """

    tokens: int
    calls: int
    passes: tuple[int, ...]
    proposals: int
    widths: tuple[Counter[int], ...]


def replay(plan: Plan, path: Path, eos: Collection[int] = (), ending: Sequence[float] = ()) -> Work:
    """Count what ``plan`` does on a text.

    Args:
        plan: lenience 1; drafters as in ``path``.
        eos: ids that end a text, and a draft.
        ending: per drafter, chance that a token it drafts behind a wrong one ends its draft; default 0.

    Raises:
        InputError: lenience above 1, another number of drafters than the path has guesses of.
    """
    if plan.lenience != 1.0:
        raise InputError(
            f"replay: lenience is {plan.lenience:g}; texts tell what a plan of lenience 1 does, count the others"
        )
    if plan.drafters > len(path.guesses):
        raise InputError(
            f"replay: the plan has {plan.drafters} drafter(s), the text guesses of {len(path.guesses)}"
        )
    return _Replay(plan, path, eos, ending).run()


def fit_ending(plan: Plan, paths: Sequence[Path], eos: Collection[int], passes: int) -> float:
    """The chance in ``ending`` with which replaying makes as many drafter passes as were counted.

    Args:
        plan: of one drafter that writes alone. paths: with that drafter. passes: counted on them.
    """
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        made = sum(replay(plan, path, eos, (middle,)).passes[0] for path in paths)
        low, high = (middle, high) if made > passes else (low, middle)
    return (low + high) / 2


@dataclass
class _Draft:
    """Tokens with who handed them on; ``ended`` where nothing may follow."""

    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    ended: bool = False


class _Replay:
    def __init__(self, plan: Plan, path: Path, eos: Collection[int], ending: Sequence[float]) -> None:
        self.plan, self.path, self.eos = plan, path, eos
        self.ending, self.chance = ending, random.Random(hash(tuple(path.tokens)))
        self.done, self.line = 0, list(path.tokens)  # the line: what stands behind the emitted tokens for now
        self.bottom = plan.drafters
        self.passes, self.proposals = [0] * self.bottom, 0
        self.widths: list[Counter[int]] = [Counter() for _ in range(self.bottom + 1)]
        # Places of the text that each drafter's cache holds, the one before the first token included.
        self.cached = [0] * self.bottom
        most = sum(row[-1] for row in plan.k)
        self.copies = [] if plan.max_gram is None else path.copies(plan.max_gram, most)

    def run(self) -> Work:
        done, calls, total = 0, 0, len(self.path.tokens)
        while done < total:
            self.done = done
            draft = self.draft_for(0, done, max(0, self.path.limit - done - 1))
            accepted = self.review(draft, done)
            self.widths[0][len(draft.tokens) + 1] += 1
            calls += 1
            drafted = slice(done, done + self.plan.depth)
            self.line[drafted] = self.path.tokens[drafted]
            done = min(done + accepted + 1, total)
            self.cached = [min(known, done) for known in self.cached]  # the rest was rejected
        return Work(total, calls, tuple(self.passes), self.proposals, tuple(self.widths))

    def review(self, draft: _Draft, start: int) -> int:
        """Tokens of the verifier's draft that stand."""
        tokens, stands = self.path.tokens, self.path.stands
        for place, (token, source) in enumerate(zip(draft.tokens, draft.sources)):
            at = start + place
            if at >= len(tokens):
                return place
            if not (token == tokens[at] if source == self.bottom else stands[source][at]):
                return place
        return len(draft.tokens)

    def draft_for(self, reviewer: int, start: int, cap: int) -> _Draft:
        draft, goal = _Draft(ended=cap < 1), 0
        for source in range(reviewer, self.bottom + 1):
            if not self.plan.k[reviewer][source]:
                continue
            goal += self.plan.k[reviewer][source]
            wanted = min(goal, cap)
            while not draft.ended and len(draft.tokens) < wanted:
                here = start + len(draft.tokens)
                if source == self.bottom:
                    self.proposals += 1
                    found = self.copies[here] if here < len(self.copies) else ()
                    self.add(draft, start, source, found[: wanted - len(draft.tokens)])
                    break
                self.add(draft, start, source, self.step(source, here, cap - len(draft.tokens)))
        return draft

    def step(self, source: int, here: int, room: int) -> list[int]:
        """Drafter ``source`` reviews what those below it propose at place ``here``, and adds a token of its own."""
        inner = self.draft_for(source + 1, here, max(0, room - 1))
        width = len(inner.tokens)
        accepted = 0
        while accepted < width and inner.tokens[accepted] == self.guess(source, here + accepted) != UNKNOWN:
            accepted += 1
        self.passes[source] += 1
        self.widths[source + 1][here + width + 1 - self.cached[source]] += 1
        self.cached[source] = here + accepted + 1
        for one in range(source + 1, self.bottom):
            self.cached[one] = min(self.cached[one], here + accepted + 1)
        own = _END if self.breaks_off(source, here) else self.guess(source, here + accepted)
        return [*inner.tokens[:accepted], own]

    def breaks_off(self, source: int, here: int) -> bool:
        """True where a drafter ends the text behind a wrong token."""
        if source >= len(self.ending) or self.line[self.done : here] == self.path.tokens[self.done : here]:
            return False
        return self.chance.random() < self.ending[source]

    def guess(self, source: int, at: int) -> int:
        column = self.path.guesses[source]
        return column[at] if at < len(column) else UNKNOWN

    def add(self, draft: _Draft, start: int, source: int, new: Sequence[int]) -> None:
        for token in new:
            at = start + len(draft.tokens)
            if at < len(self.line):
                self.line[at] = token
            draft.tokens.append(token)
            draft.sources.append(source)
            if token == _END or token in self.eos or at + 1 >= len(self.line):
                draft.ended = True
                return
