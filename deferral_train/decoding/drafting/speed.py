"""The speed model, seconds of decoding from counted passes; and EWIF, the expected walltime improvement factor.

EWIF is how fast a plan is expected to be, from acceptance and costs. It assumes that whether a token is accepted
depends on who proposed it, who reviews it and its place, and on nothing else. Its costs are in verifier passes:
c = time of a drafter's pass over the verifier's. For one drafter it is theorem 3.8 of Leviathan et al. 2023, for one
level theorems 4.3 (vertical) and 4.5 (horizontal) of Chen et al. 2024; the model of a whole K matrix, with its
overshooting drafts, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from deferral_train.decoding.drafting.plan import Plan
from deferral_train.errors import InputError

if TYPE_CHECKING:
    from deferral_train.decoding.drafting.replay import Work

# (reviewer, source) -> acceptance by place within the run of that source's tokens; the last value goes on.
Acceptance = Mapping[tuple[int, int], Sequence[float]]


@dataclass(frozen=True)
class LoopSeconds:
    """Seconds of the decoding loop besides the verifier's passes.

    Attributes:
        prompt: of each prompt.
        round: of each round (a draft and its verification).
        step: of each drafter pass, with all that belongs to it.
    """

    prompt: float
    round: float
    step: float


@dataclass(frozen=True)
class SpeedModel:
    """Seconds of decoding at batch 1, from counts of what was done.

    Attributes:
        verifier: seconds of a verifier pass by the number of tokens that go through it; between them linear.
        plain, cascade: of the loop with one drafter, and with a cascade of drafters.
        prompt, token: of the verifier alone, for each prompt and each token.
    """

    verifier: Mapping[int, float]
    plain: LoopSeconds
    cascade: LoopSeconds
    prompt: float
    token: float

    @classmethod
    def of_passes(
        cls, drafter: float, verifier: float, verifier_token: float | None = None, head: float = 0.0
    ) -> SpeedModel:
        """From seconds of single passes, whatever their width.

        Args:
            drafter: of one drafter step.
            verifier: of one verifying pass.
            verifier_token: of one token by the verifier alone, default ``verifier``.
            head: of the head, in each round.
        """
        loop = LoopSeconds(0.0, head, drafter)
        return cls({1: verifier}, loop, loop, 0.0, verifier if verifier_token is None else verifier_token)

    def alone(self, tokens: int) -> float:
        """Seconds of the verifier alone for a text."""
        return self.prompt + tokens * self.token

    def of(self, work: Work, cascade: bool) -> float:
        """Seconds of a text under a drafting plan, from its replayed work."""
        loop = self.cascade if cascade else self.plain
        widths = list(work.widths[0])
        verifying = float(np.dot(self.passes(widths), [work.widths[0][width] for width in widths]))
        return loop.prompt + verifying + work.calls * loop.round + sum(work.passes) * loop.step

    def round(self, drafted: Any) -> Any:
        """Seconds of a round, which drafts so many tokens and verifies them, prompts left out; a number or an array."""
        verifying = self.passes(np.asarray(drafted) + 1)
        return verifying + drafted * self.plain.step + self.plain.round

    def relative(self, calls_per_token: np.ndarray, num_draft_tokens: int) -> np.ndarray:
        """Predicted time against the verifier alone, prompts left out; any shape."""
        return calls_per_token * self.round(num_draft_tokens) / self.token

    def passes(self, widths: Any) -> np.ndarray:
        """Seconds of verifier passes of these widths, a number or an array.

        Beyond the widest known one they go on in a straight line.
        """
        known = sorted(self.verifier)
        seconds = [self.verifier[width] for width in known]
        slope = (seconds[-1] - seconds[0]) / (known[-1] - known[0]) if len(known) > 1 else 0.0
        beyond = np.maximum(np.asarray(widths) - known[-1], 0) * max(slope, 0.0)
        return np.interp(widths, known, seconds) + beyond


@dataclass(frozen=True)
class Expected:
    """Expected tokens and passes of one round of a plan.

    Attributes:
        tokens: emitted per verifier pass, the verifier's own included.
        passes: of each drafter, the largest first.
        ewif: tokens per unit of verifier time; 1 is the verifier alone.
    """

    tokens: float
    passes: tuple[float, ...]
    ewif: float


def expect(
    plan: Plan, acceptance: Acceptance, costs: Sequence[float], max_gram_cost: float = 0.0
) -> Expected:
    """The speed of a plan.

    Args:
        acceptance: see :data:`Acceptance`; every pair that ``plan.k`` uses.
        costs: of one pass of each drafter, in verifier passes.
        max_gram_cost: of one proposal of Max-Gram, in verifier passes.

    Raises:
        InputError: a pair without an acceptance, a wrong number of costs.
    """
    if len(costs) != plan.drafters:
        raise InputError(f"costs has {len(costs)} entries for {plan.drafters} drafter(s); give one for each")
    built: dict[int, _Draft] = {}
    for reviewer in range(plan.drafters, -1, -1):
        built[reviewer] = _draft_for(plan, reviewer, acceptance, built)
    draft = built[0]
    tokens = 1 + sum(draft.survive[1:])
    spent = (
        1 + sum(cost * count for cost, count in zip(costs, draft.passes)) + max_gram_cost * draft.passes[-1]
    )
    return Expected(tokens, tuple(draft.passes[:-1]), tokens / spent)


@dataclass
class _Draft:
    """A draft for one reviewer: chance that its first t tokens exist and are accepted; expected passes of each
    drafter and proposals of Max-Gram.
    """

    survive: list[float]
    passes: list[float]

    def step(self) -> list[float]:
        """Chance that the reviewer hands on m tokens, m = 0.. (never 0): accepted ones and its own."""
        reach = [*self.survive, 0.0]
        return [0.0] + [reach[count] - reach[count + 1] for count in range(len(self.survive))]


@dataclass
class _State:
    """Chances by drafted tokens: of being there, and of being there with all of them accepted."""

    there: dict[int, float] = field(default_factory=lambda: {0: 1.0})
    alive: dict[int, float] = field(default_factory=lambda: {0: 1.0})


def _draft_for(plan: Plan, reviewer: int, acceptance: Acceptance, built: Mapping[int, _Draft]) -> _Draft:
    bottom = plan.drafters
    draft = _Draft([1.0] + [0.0] * plan.longest[reviewer], [0.0] * (bottom + 1))
    state, goal = _State(), 0
    for source in range(reviewer, bottom + 1):
        if not plan.k[reviewer][source]:
            continue
        goal += plan.k[reviewer][source]
        rates = acceptance.get((reviewer, source))
        if not rates:
            raise InputError(f"acceptance of source {source} by reviewer {reviewer} is not known; measure it")
        ends = _State({}, {})
        for start, there in state.there.items():
            alive = state.alive.get(start, 0.0)
            if start >= goal:
                _gain(ends, start, there, alive)
            elif source == bottom:
                draft.passes[bottom] += there
                steps = [0.0] * (goal - start) + [1.0]
                _run(draft, ends, start, goal, there, alive, steps, rates)
            else:
                inner = built[source + 1]
                reviews = _run(draft, ends, start, goal, there, alive, inner.step(), rates)
                draft.passes[source] += reviews
                draft.passes = [sum(pair) for pair in zip(draft.passes, (reviews * x for x in inner.passes))]
        state = ends
    return draft


def _run(
    draft: _Draft,
    ends: _State,
    start: int,
    goal: int,
    there: float,
    alive: float,
    steps: Sequence[float],
    rates: Sequence[float],
) -> float:
    """One source drafts from ``start`` tokens until there are ``goal``; its expected number of steps."""
    state, reviews = _State({start: there}, {start: alive}), 0.0
    for place in range(start, goal):
        here, lives = state.there.pop(place, 0.0), state.alive.pop(place, 0.0)
        reviews += here
        for count, chance in enumerate(steps if here else ()):
            if chance > 0:
                kept = lives * chance
                for more in range(count):
                    kept *= rates[min(place - start + more, len(rates) - 1)]
                    draft.survive[place + more + 1] += kept
                _gain(state, place + count, here * chance, kept)
    for place in state.there:
        _gain(ends, place, state.there[place], state.alive[place])
    return reviews


def _gain(state: _State, place: int, there: float, alive: float) -> None:
    state.there[place] = state.there.get(place, 0.0) + there
    state.alive[place] = state.alive.get(place, 0.0) + alive
