"""A cascade of drafters and its verifier, enumerated: every draft, every acceptance, every correction, in float64.

Written from docs/equations.md without looking at the tensor code. Models are functions from a prefix (tuple of
ids) to a distribution (list of floats); model 0 is the verifier. A branch is (probability, tokens, distributions),
with the distribution that each token is said to have been drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Distribution = list[float]
Branch = tuple[float, tuple[int, ...], tuple[Distribution, ...]]


def residual(p: Distribution, q: Distribution) -> Distribution:
    """max(0, p - q), normalised; p where nothing is left."""
    excess = [max(0.0, a - b) for a, b in zip(p, q)]
    total = math.fsum(excess)
    return [x / total for x in excess] if total > 0 else p


def exact_distribution(q: Distribution, p: Distribution, lenience: float) -> Distribution:
    """a + (1 - sum a) norm(max(0, p - q)), a = min(q, l p)."""
    stands = [min(a, lenience * b) for a, b in zip(q, p)]
    rest = math.fsum(a - b for a, b in zip(q, stands))
    return [a + rest * b for a, b in zip(stands, residual(p, q))]


class Enumeration:
    """All that can happen in one round.

    Args:
        models: verifier first, then the drafters.
        copy: Max-Gram, (prefix, count) -> tokens.
        k: the K matrix.
        lenience: between drafters.
        naive: say that reviewed tokens come from the reviewer's own distribution, which they do not.
    """

    def __init__(
        self,
        models: Sequence[Callable[[tuple[int, ...]], Distribution]],
        copy: Callable[[tuple[int, ...], int], list[int]],
        k: Sequence[Sequence[int]],
        lenience: float,
        naive: bool = False,
    ) -> None:
        self.models, self.copy, self.k, self.lenience, self.naive = models, copy, k, lenience, naive
        self.bottom = len(k) - 1

    def round(self, prefix: tuple[int, ...], cap: int) -> list[Branch]:
        """What the verifier emits in one round after ``prefix``, from a draft of at most ``cap`` tokens."""
        return [
            branch
            for draft in self.draft_for(0, prefix, cap)
            for branch in self.review(prefix, draft, 0, 1.0)
        ]

    def draft_for(self, reviewer: int, prefix: tuple[int, ...], cap: int) -> list[Branch]:
        branches: list[Branch] = [(1.0, (), ())]
        total = 0
        for source in range(reviewer, self.bottom + 1):
            if not self.k[reviewer][source]:
                continue
            total += self.k[reviewer][source]
            branches = [
                end for branch in branches for end in self.grow(source, prefix, branch, min(total, cap), cap)
            ]
        return branches

    def grow(self, source: int, prefix: tuple[int, ...], branch: Branch, goal: int, cap: int) -> list[Branch]:
        chance, tokens, distributions = branch
        if len(tokens) >= goal:
            return [branch]
        here = prefix + tokens
        size = len(self.models[0](prefix))
        if source == self.bottom:
            new = tuple(self.copy(here, goal - len(tokens)))
            one_hots = tuple([1.0 if v == token else 0.0 for v in range(size)] for token in new)
            return [(chance, tokens + new, distributions + one_hots)]
        found = []
        for draft in self.draft_for(source + 1, here, cap - len(tokens) - 1):
            for more, new, new_distributions in self.review(here, draft, source + 1, self.lenience):
                grown = (chance * more, tokens + new, distributions + new_distributions)
                found += self.grow(source, prefix, grown, goal, cap)
        return found

    def review(self, prefix: tuple[int, ...], draft: Branch, model: int, lenience: float) -> list[Branch]:
        alive, tokens, distributions = draft
        found: list[Branch] = []
        out: tuple[Distribution, ...] = ()
        for place, (token, q) in enumerate(zip(tokens, distributions)):
            p = self.models[model](prefix + tokens[:place])
            stands = min(1.0, lenience * p[token] / q[token])
            out += (p if self.naive else exact_distribution(q, p, lenience),)
            for v, weight in enumerate(residual(p, q)):
                if weight > 0 and stands < 1:
                    found.append((alive * (1 - stands) * weight, (*tokens[:place], v), out))
            alive *= stands
            if alive == 0:
                return found
        p = self.models[model](prefix + tokens)
        return found + [
            (alive * weight, (*tokens, v), (*out, p)) for v, weight in enumerate(p) if alive * weight > 0
        ]
