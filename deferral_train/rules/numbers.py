"""Summary fields of greedy positions as NumPy arrays, each worked out when it is first read.

At temperature 0 a rule reads a handful of numbers per position, and the work on them is less than what it costs to ask
for it: between two passes of a model caches are cold, so that every operation counts, and torch's count most. Hence the
models' logits are read where they lie, one exponential and one sum over the vocabulary serve every field, and a rule
whose decision is arithmetic gets arrays. Same fields as summary.py up to rounding, which the tests check.

B batch, T places of the block, V vocabulary, N positions: all B * T of them, or some.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from deferral_train.errors import InputError
from deferral_train.rules.summary import Summary

try:
    import numpy as np
except ImportError:  # a served head runs where torch alone is installed
    np = None  # type: ignore[assignment]

SMALL, LARGE = 2**16, 2**23  # elements of a block whose memory is kept
# Where the largest exponential and the sum are within these, exponentials need no shift by the largest logit.
LEAST, MOST = 1e-15, 1e35
Array = Any


class _Kept(threading.local):
    """Memory for the blocks of a thread, kept from one to the next.

    Fresh memory for a block of a batch costs more than the arithmetic on it: every page of it is faulted in.
    """

    def __init__(self) -> None:
        self.flat: dict[tuple[str, Any], Array] = {}

    def rows(self, name: str, count: int, size: int, dtype: Any) -> Array:
        """Uninitialised memory [count, size]."""
        total = count * size
        if not SMALL < total <= LARGE:
            return np.empty((count, size), dtype)
        flat = self.flat.get((name, dtype))
        if flat is None or flat.size < total:
            flat = self.flat[name, dtype] = np.empty(total, dtype)
        return flat[:total].reshape(count, size)


_KEPT = _Kept()


class Side:
    """One model's decision law at N positions.

    Args:
        parts: logits along the block, [B, k, V] each; their first ``depth`` columns are read.
        what: names the logits in errors.
        argmax: the lowest argmax [B, T] where it is known.
        places: (b, t) of the positions spoken of; None for all, row by row.
    """

    sums: Array  # [N], of the exponentials
    tops: Array  # [N], the largest of them
    starts: Array  # [N], where each position begins in them

    def __init__(
        self,
        parts: Sequence[Array],
        depth: int,
        what: str,
        argmax: Array | None = None,
        places: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.parts, self.depth, self.what, self.places = parts, depth, what, places
        self._block_argmax = argmax
        self.moved: dict[int, Array] = {}  # logits of positions that were shifted before the exponential
        self._columns: list[Array] = []
        self._argmax: Array = None
        self._exps: Array = None

    def columns(self) -> list[Array]:
        """Logits [B, V] of each place."""
        if not self._columns:
            self._columns = [part[:, step] for part in self.parts for step in range(part.shape[1])]
        return self._columns

    def argmax(self) -> Array:
        """[N]."""
        if self._argmax is None:
            if self._block_argmax is None:
                columns = self.columns()[: self.depth]
                self._block_argmax = np.stack([column.argmax(axis=-1) for column in columns], axis=1)
            self._argmax = self._block_argmax.reshape(-1)
        return self._argmax

    def only(self, positions: Sequence[int]) -> Side:
        """The same law at some of all positions, given by index."""
        argmax = self.argmax()
        places = [divmod(n, self.depth) for n in positions]
        fewer = Side(self.parts, self.depth, self.what, None, places)
        fewer._columns, fewer._argmax = self.columns(), argmax.take(positions)
        return fewer

    def exps(self) -> Array:
        """Exponentials [N, V] of the logits; of those less the largest where that would leave the range."""
        if self._exps is not None:
            return self._exps
        batch, size = self.parts[0].shape[0], self.parts[0].shape[2]
        count = batch * self.depth if self.places is None else len(self.places)
        name = self.what if self.places is None else f"some {self.what}"
        exps = self._exps = _KEPT.rows(name, count, size, self.parts[0].dtype)
        if self.places is None:
            block = exps.reshape(batch, self.depth, size)
            for begin, end, part in self._spans():
                np.exp(part, out=block[:, begin:end])
        else:
            columns = self.columns()
            for n, (b, t) in enumerate(self.places):
                np.exp(columns[t][b], out=exps[n])
        self.starts = _starts(count, size)
        self.sums = np.add.reduce(exps, axis=-1)
        self.tops = exps.reshape(-1).take(self.starts + self.argmax())
        sums, tops = self.sums.tolist(), self.tops.tolist()
        if not (math.isfinite(sum(sums)) and max(sums) < MOST and min(tops) > LEAST):
            self._shift(exps, [n for n, (a, b) in enumerate(zip(sums, tops)) if not (a < MOST and b > LEAST)])
        return exps

    def _spans(self) -> Iterator[tuple[int, int, Array]]:
        """First column, end and logits of each part, as far as columns are read."""
        begin = 0
        for part in self.parts:
            end = min(begin + part.shape[1], self.depth)
            if begin < end:
                yield begin, end, part[:, : end - begin]
            begin = end

    def _place(self, n: int) -> tuple[int, int]:
        return divmod(n, self.depth) if self.places is None else self.places[n]

    def _logits(self, n: int) -> Array:
        """Logits [V] of a position, as its exponentials were taken from."""
        if n in self.moved:
            return self.moved[n]
        b, t = self._place(n)
        return self.columns()[t][b]

    def _shift(self, exps: Array, positions: Sequence[int]) -> None:
        for n in positions:
            logits = self._logits(n)
            top = logits[self.argmax()[n]]
            if not math.isfinite(top):
                raise InputError(
                    f"{self.what} has NaN, +inf or only -inf; logits must be finite, with -inf only for masked tokens"
                )
            self.moved[n] = logits - top
            np.exp(self.moved[n], out=exps[n])
            self.sums[n], self.tops[n] = exps[n].sum(), 1.0

    def largest(self) -> Array:
        """The largest probability, [N]."""
        self.exps()
        return self.tops / self.sums

    def prob(self, token: Array) -> Array:
        """Probabilities of tokens [N]."""
        return self.exps().reshape(-1).take(self.starts + token) / self.sums

    def prob_above_zero(self, token: Array) -> Array:
        """As :meth:`prob`, but 0 for masked tokens alone: not for one too unlikely for the number format."""
        dtype = self.parts[0].dtype
        floor = np.where(self._at(token) > -np.inf, np.finfo(dtype).tiny, 0).astype(dtype)
        return np.maximum(self.prob(token), floor)

    def logprob(self, token: Array) -> Array:
        """log probabilities of tokens [N], right where the probability would underflow; never above 0."""
        return np.minimum(self._at(token) - self._at(self.argmax()) + np.log(self.largest()), 0.0)

    def _at(self, token: Array) -> Array:
        columns = self.columns()
        if self.places is not None:
            return np.array([columns[t][b, x] for (b, t), x in zip(self.places, token.tolist())])
        rows, block = np.arange(len(columns[0])), token.reshape(-1, self.depth)
        return np.stack([columns[t][rows, block[:, t]] for t in range(self.depth)], axis=1).reshape(-1)

    def entropy(self) -> Array:
        """Nats, [N]."""
        return np.maximum(self.cross_entropy(self), 0.0)

    def cross_entropy(self, other: Side) -> Array:
        """-sum p log r of this law p and another's r, nats [N]; +inf where p gives a token that r forbids."""
        exps = self.exps()
        other.exps()
        means = self._means(exps, other)
        for n, logits in other.moved.items():
            means[n] = np.dot(exps[n], logits)
        if not math.isfinite(sum(means.tolist())):  # masked tokens: no 0 * inf
            for n in np.flatnonzero(~np.isfinite(means)).tolist():
                means[n] = np.dot(exps[n], np.where(exps[n] == 0, 0, other._logits(n)))
        return np.log(other.sums) - means / self.sums

    def _means(self, exps: Array, other: Side) -> Array:
        """Another's logits, weighted with these exponentials, [N]."""
        if self.places is not None:
            columns = other.columns()
            return np.array([np.dot(exps[n], columns[t][b]) for n, (b, t) in enumerate(self.places)])
        block = exps.reshape(-1, self.depth, exps.shape[1])
        spans = [_dots(block[:, begin:end], part) for begin, end, part in other._spans()]
        return np.concatenate(spans, axis=1).reshape(-1)


@lru_cache(maxsize=64)
def _starts(count: int, size: int) -> Array:
    return np.arange(0, count * size, size)


def _dots(left: Array, right: Array) -> Array:
    return np.vecdot(left, right) if hasattr(np, "vecdot") else np.einsum("btv,btv->bt", left, right)


def _kl(first: Side, second: Side) -> Array:
    return np.maximum(first.cross_entropy(second) - first.cross_entropy(first), 0.0)


FORMULAS: dict[str, Callable[[Side, Side, Array], Array]] = {
    "drafter_max": lambda q, p, x: q.largest(),
    "verifier_max": lambda q, p, x: p.largest(),
    "drafter_argmax": lambda q, p, x: q.argmax(),
    "verifier_argmax": lambda q, p, x: p.argmax(),
    "drafter_at_verifier_argmax": lambda q, p, x: q.prob(p.argmax()),
    "verifier_at_drafter_argmax": lambda q, p, x: p.prob(q.argmax()),
    "drafter_entropy": lambda q, p, x: q.entropy(),
    "verifier_entropy": lambda q, p, x: p.entropy(),
    "cross_entropy": lambda q, p, x: p.cross_entropy(q),
    "kl": lambda q, p, x: _kl(p, q),
    "reverse_kl": lambda q, p, x: _kl(q, p),
    "tv": lambda q, p, x: (q.argmax() != p.argmax()).astype(q.parts[0].dtype),
    "token": lambda q, p, x: x,
    "drafter_logprob": lambda q, p, x: q.logprob(x),
    "verifier_logprob": lambda q, p, x: p.logprob(x),
}


class Numbers(Mapping[str, Array]):
    """Fields [N] of positions by their names in the summary; reading one works it out.

    Stands in for a :class:`Summary` before rules whose decision is arithmetic and comparison alone.

    Args:
        token: drafted tokens [N].
        context: fields that logits do not give, [N, ..].
        differing: the positions whose argmaxes differ, where that is known.
    """

    def __init__(
        self,
        drafter: Side,
        verifier: Side,
        token: Array,
        context: Mapping[str, Array] | None = None,
        differing: list[int] | None = None,
    ) -> None:
        self.drafter, self.verifier, self.token = drafter, verifier, token
        self.context = context or {}
        self._differing = differing
        self._read: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        found = self._read.get(name)
        if found is None:
            formula = FORMULAS.get(name)
            found = (
                self.context[name] if formula is None else formula(self.drafter, self.verifier, self.token)
            )
            self._read[name] = found
        return found

    def __contains__(self, name: object) -> bool:
        return name in FORMULAS or name in self.context

    def __iter__(self) -> Iterator[str]:
        return iter((*FORMULAS, *self.context))

    def __len__(self) -> int:
        return len(FORMULAS) + len(self.context)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,)."""
        return self.token.shape

    def full(self, value: bool) -> Array:
        """One decision for every position, bool [N]."""
        return np.full(self.token.shape, value)

    def differing(self) -> list[int]:
        """The positions whose argmaxes differ."""
        if self._differing is None:
            self._differing = np.flatnonzero(self.drafter.argmax() != self.verifier.argmax()).tolist()
        return self._differing

    def only(self, positions: Sequence[int]) -> Numbers:
        """The numbers at some of all positions, given by index."""
        context = {name: values[positions] for name, values in self.context.items()}
        q, p = self.drafter.only(positions), self.verifier.only(positions)
        return Numbers(q, p, self.token.take(positions), context)

    def summary(self, fields: Iterable[str], shape: tuple[int, ...]) -> Summary:
        """Fields as tensors of this leading shape."""
        return Summary({name: torch.from_numpy(_shaped(self[name], shape)) for name in fields})


def _shaped(values: Array, shape: tuple[int, ...]) -> Array:
    return values.reshape(shape + values.shape[1:])
