"""The longest suffix of a growing text that has occurred in it before: a suffix automaton that can also shrink.

Extending by a token is amortised constant, the match is read off in constant time, and shrinking undoes the
latest extensions, which drafting needs: drafted tokens belong to the text until the verifier rejects them.
Source: Blumer et al. 1985, online construction; the undo is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

GRAMS = (1, 4, 16)  # lengths of the n-grams whose occurrences are chained for the latest match


class Match(NamedTuple):
    """``text[end - length + 1 : end + 1]`` equals the text's last ``length`` tokens, and ends before them.

    ``length`` is 0 and ``end`` -1 where even the last token is new.
    """

    length: int
    end: int


class SuffixIndex:
    """A text of token ids and its suffix automaton.

    Args:
        latest: also keep what :meth:`latest` needs, at about twice the cost of an extension.

    Attributes:
        text: the ids so far; read only.
    """

    def __init__(self, tokens: Iterable[int] = (), latest: bool = False) -> None:
        self.text: list[int] = []
        # One entry per state: longest string, suffix link, transitions, end of its first occurrence.
        self._length, self._link, self._first_end = [0], [-1], [-1]
        self._next: list[dict[int, int]] = [{}]
        self._last = 0
        self._undo: list[tuple[int, int]] = []  # (state before, state that was split or -1) per extension
        self._grams: list[dict[tuple[int, ...], int]] | None = [{} for _ in GRAMS] if latest else None
        self._before: list[list[int]] = [[] for _ in GRAMS]  # end of the previous occurrence of the n-gram
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.text)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        length, link, following = self._length, self._link, self._next
        before, new = self._last, len(self._length)
        position = len(self.text)
        self.text.append(token)
        length.append(position + 1)
        self._first_end.append(position)
        following.append({})
        link.append(0)
        state, split = before, -1
        while state != -1 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state != -1:
            target = following[state][token]
            if length[state] + 1 == length[target]:
                link[new] = target
            else:
                split = target
                self._split(state, token, target)
        self._last = new
        self._undo.append((before, split))
        if self._grams is not None:
            self._chain(position)

    def _split(self, state: int, token: int, target: int) -> None:
        """Part the short strings of ``target`` from the long ones: they have occurred here too."""
        link, following = self._link, self._next
        clone = len(self._length)
        self._length.append(self._length[state] + 1)
        self._first_end.append(self._first_end[target])
        following.append(following[target].copy())
        link.append(link[target])
        while state != -1 and following[state].get(token) == target:
            following[state][token] = clone
            state = link[state]
        link[target] = link[clone - 1] = clone

    def shrink(self, size: int) -> None:
        """Undo extensions until ``size`` tokens are left."""
        while len(self.text) > size:
            self._pop()

    def _pop(self) -> None:
        if self._grams is not None:
            self._unchain()
        link, following = self._link, self._next
        token = self.text.pop()
        new, (before, split) = self._last, self._undo.pop()
        clone = new + 1
        if split != -1:
            link[split] = link[clone]
        state = before
        while state != -1 and following[state].get(token) == new:
            del following[state][token]
            state = link[state]
        if split != -1:
            while state != -1 and following[state].get(token) == clone:
                following[state][token] = split
                state = link[state]
        for column in (self._length, link, following, self._first_end):
            del column[new:]
        self._last = before

    def _chain(self, position: int) -> None:
        for size, grams, before in zip(GRAMS, self._grams or (), self._before):
            key = tuple(self.text[position + 1 - size :]) if position + 1 >= size else None
            before.append(-1 if key is None else grams.get(key, -1))
            if key is not None:
                grams[key] = position

    def _unchain(self) -> None:
        position = len(self.text) - 1
        for size, grams, before in zip(GRAMS, self._grams or (), self._before):
            previous = before.pop()
            if position + 1 < size:
                continue
            key = tuple(self.text[position + 1 - size :])
            if previous == -1:
                del grams[key]
            else:
                grams[key] = previous

    def earliest(self) -> Match:
        """The longest suffix that occurs before, where it occurs first."""
        state = self._link[self._last]
        return Match(0, -1) if state <= 0 else Match(self._length[state], self._first_end[state])

    def latest(self) -> Match:
        """The longest suffix that occurs before, where it occurs last before the end.

        Walks the chain of the longest n-gram that it contains; the first link is the answer unless the text
        repeats that n-gram behind other words.

        Raises:
            ValueError: the index was not made with ``latest=True``.
        """
        if self._grams is None:
            raise ValueError("this index does not keep the latest occurrences; make it with latest=True")
        length = self.earliest().length
        if not length:
            return Match(0, -1)
        which = max(place for place, size in enumerate(GRAMS) if size <= length)
        suffix, before = self.text[-length:], self._before[which]
        end = before[-1]
        while self.text[end - length + 1 : end + 1] != suffix:
            end = before[end]
        return Match(length, end)
