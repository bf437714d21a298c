"""How fast a plan is expected to be: EWIF, the expected walltime improvement factor, from acceptance and costs.

All of it assumes that whether a token is accepted depends on who proposed it, who reviews it and its place, and
on nothing else. Costs are in verifier passes: c = time of a drafter's pass over the verifier's. Sources: Leviathan
et al. 2023, theorem 3.8 (plain); Chen et al. 2024, theorems 4.3 (vertical) and 4.5 (horizontal); the model of a
whole K matrix, with its overshooting drafts, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deferral_train.decoding.drafting.plan import Plan
from deferral_train.errors import InputError

# (reviewer, source) -> acceptance by place within the run of that source's tokens; the last value goes on.
Acceptance = Mapping[tuple[int, int], Sequence[float]]


def ewif_plain(acceptance: float, tokens: int, cost: float) -> float:
    """(1 - a^(k+1)) / ((1 - a) (1 + k c)): one drafter writes k tokens."""
    return _powers(acceptance, tokens + 1) / (1 + tokens * cost)


def ewif_vertical(outer: float, inner: float, runs: int, tokens: int, costs: tuple[float, float]) -> float:
    """(1 - a phi(a)^n) / ((1 - a) (1 + n c1 + n k c2)): n reviews by drafter 1 of k tokens of drafter 2 each.

    phi(x) = 1 + (x - 1) (1 - (b x)^(k+1)) / (1 - b x) is the generating function of the tokens per review.

    Args:
        outer: a, acceptance of drafter 1 by the verifier.
        inner: b, acceptance of drafter 2 by drafter 1.
        runs, tokens: n and k.
        costs: c1, c2.
    """
    phi = 1 + (outer - 1) * _powers(inner * outer, tokens + 1)
    # (1 - a phi^n) / (1 - a) = 1 + a (1 - phi^n) / (1 - a), and (1 - phi) / (1 - a) stays finite at a = 1.
    gained = outer * _powers(inner * outer, tokens + 1) * _powers(phi, runs)
    return (1 + gained) / (1 + runs * costs[0] + runs * tokens * costs[1])


def ewif_horizontal(acceptances: Sequence[float], costs: Sequence[float]) -> float:
    """sum_{i=0..k} prod_{j<=i} a_j / (1 + sum_i c_i): place i is drafted by its own drafter."""
    reach, expected = 1.0, 1.0
    for acceptance in acceptances:
        reach *= acceptance
        expected += reach
    return expected / (1 + sum(costs))


def _powers(base: float, count: int) -> float:
    """1 + base + .. + base^(count-1)."""
    return sum(base**power for power in range(count))


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
