"""Sequence labels at temperature 0: what becomes of the finished text where the drafter's argmax is kept.

At every place of a path where drafter and verifier favour different tokens v_q and v_p,

    gap = Q(prefix + v_p, then the verifier) - Q(prefix + v_q, then the verifier),

Q being the task's score of a finished text: Lemma 4 with the loss 1 - Q. One gap per metric. Most of these texts need
not be written: where the path itself took one of the two tokens, the verifier's text behind it is that of the next
place, up to the path's next departure from the verifier. N scored positions, M metrics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deferral_train.collecting.continuations import Branch, Finisher, Greedy, PathTexts

# Finished texts and the references of their prompts to scores [n]; NaN where a scorer gave none.
Score = Callable[[Sequence[str], Sequence[str | None]], np.ndarray]
Text = Callable[[Sequence[int]], str]  # tokens to text


@dataclass(frozen=True)
class Argmaxes:
    """Both models' argmaxes along one text, a token per place.

    Attributes:
        drafter: v_q.
        verifier: v_p.
    """

    drafter: Sequence[int]
    verifier: Sequence[int]


@dataclass(frozen=True)
class Place:
    """A labelled place and the finished texts of its two tokens.

    Attributes:
        row: number of the text in the batch.
        place: among the tokens that follow the prompt.
        kept: what comes of v_q.
        deferred: what comes of v_p.
    """

    row: int
    place: int
    kept: Sequence[int]
    deferred: Sequence[int]


def prompt_seed(seed: int, prompt: str, what: str) -> int:
    """A seed that depends on nothing but the base seed, the prompt's id and what it is for."""
    digest = hashlib.sha256(f"{seed}\n{what}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draw_places(places: Sequence[int], share: float, seed: int) -> list[int]:
    """About ``share`` of a text's places, each with exactly that chance.

    The count is ``share`` times their number, rounded up or down by chance, so that a sum over what is drawn, divided
    by the share, is unbiased.
    """
    if share >= 1:
        return list(places)
    generator = np.random.default_rng(seed)
    count = int(share * len(places) + generator.random())
    return sorted(int(place) for place in generator.permutation(list(places))[:count])


class GreedyTexts:
    """The verifier's greedy texts along the paths of a batch, each written once.

    Args:
        path: the texts.
        argmaxes: of every text.
    """

    def __init__(self, path: PathTexts, argmaxes: Sequence[Argmaxes]) -> None:
        self.path, self.argmaxes = path, argmaxes
        self._wanted: dict[Branch, None] = {}
        self._finished: dict[Branch, list[int]] = {}
        self._departures = [
            [place for place, token in enumerate(text) if token != own.verifier[place]]
            for text, own in zip(path.texts, argmaxes)
        ]

    def after(self, row: int, place: int) -> Branch | None:
        """The branch that writes the verifier's text behind the path's first ``place`` tokens; None: the path does."""
        for departure in self._departures[row]:
            if departure >= place:
                return Branch(row, departure, self.argmaxes[row].verifier[departure])
        return None

    def behind(self, row: int, place: int, token: int) -> Branch | None:
        """As :meth:`after`, with ``token`` put at ``place``."""
        if token == self.path.texts[row][place]:
            return self.after(row, place + 1)
        return Branch(row, place, token)

    def want(self, branch: Branch | None) -> None:
        """Have this branch written by the next :meth:`write`."""
        if branch is not None and branch not in self._finished:
            self._wanted[branch] = None

    def write(self, finisher: Finisher) -> None:
        self._finished |= finisher.finish(self.path, list(self._wanted), Greedy())
        self._wanted.clear()

    def tokens(self, row: int, branch: Branch | None) -> Sequence[int]:
        """A finished text; ``row`` says whose path it is where no branch was needed."""
        return self.path.texts[row] if branch is None else self._finished[branch]


def differing(argmaxes: Argmaxes) -> list[int]:
    """Places of a text where the two models favour different tokens."""
    pairs = zip(argmaxes.drafter, argmaxes.verifier)
    return [place for place, (drafter, verifier) in enumerate(pairs) if drafter != verifier]


def finished_places(
    finisher: Finisher,
    path: PathTexts,
    argmaxes: Sequence[Argmaxes],
    chosen: Sequence[Sequence[int]],
    own: bool = False,
) -> tuple[list[Place], list[Sequence[int]]]:
    """Both finished texts of every chosen place, and with ``own`` the verifier's own text of every prompt.

    Args:
        finisher: has the verifier finish the texts.
        path: what the places lie on.
        argmaxes: of each text.
        chosen: places of each text.
        own: whether the verifier's own texts are wanted, else that list is empty.
    """
    texts = GreedyTexts(path, argmaxes)
    wanted = []
    for row, places in enumerate(chosen):
        for place in places:
            pair = (
                texts.behind(row, place, argmaxes[row].drafter[place]),
                texts.behind(row, place, argmaxes[row].verifier[place]),
            )
            wanted.append((row, place, pair))
            for branch in pair:
                texts.want(branch)
    starts = [texts.after(row, 0) for row in range(len(path.texts))] if own else []
    for branch in starts:
        texts.want(branch)
    texts.write(finisher)
    found = [
        Place(row, place, texts.tokens(row, kept), texts.tokens(row, deferred))
        for row, place, (kept, deferred) in wanted
    ]
    return found, [texts.tokens(row, branch) for row, branch in enumerate(starts)]


@dataclass
class ScoredTexts:
    """Scores of texts by prompt, each text scored once.

    Args:
        score: of texts against references.
        references: by row.
    """

    score: Score
    references: Sequence[str | None]
    _known: dict[tuple[int, str], float] = field(default_factory=dict)

    def __call__(self, items: Sequence[tuple[int, str]]) -> np.ndarray:
        """Scores [n] of (row, text)."""
        new = [item for item in dict.fromkeys(items) if item not in self._known]
        if new:
            found = self.score([text for _, text in new], [self.references[row] for row, _ in new])
            self._known |= {item: float(value) for item, value in zip(new, found)}
        return np.array([self._known[item] for item in items])


def gaps(
    places: Sequence[Place], text: Text, scores: Mapping[str, Score], references: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Gap of every place under every metric [n, M], and how many words longer the text of v_q is [n].

    Args:
        places: with their finished texts.
        text: of tokens.
        scores: metric to scorer, in [0, 1].
        references: by row.
    """
    kept = [(one.row, text(one.kept)) for one in places]
    deferred = [(one.row, text(one.deferred)) for one in places]
    found = []
    for score in scores.values():
        scored = ScoredTexts(score, references)
        both = scored([*deferred, *kept])
        found.append(both[: len(places)] - both[len(places) :])
    words = np.array([len(a.split()) - len(b.split()) for (_, a), (_, b) in zip(kept, deferred)], dtype=float)
    table = np.stack(found, axis=1) if places else np.zeros((0, len(scores)))
    return table, words
