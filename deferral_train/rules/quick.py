"""The summary of a greedy block on a CPU, with as few operations as will do.

At temperature 0 a rule reads a handful of numbers per position. Computed one by one as in summary.py they cost more
in dispatching tensor operations than in arithmetic; here NumPy does what is small and torch the three passes over
[B, T, V] that are not. Same fields, up to rounding, which the tests check. B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import PositionRule, Rule, TokenRule
from deferral_train.rules.summary import CONTEXT_FIELDS, Summary

try:
    import numpy as np
except ImportError:  # a served head runs where torch alone is installed
    np = None  # type: ignore[assignment]

SMALL, LARGE = 2**16, 2**23  # elements of a block whose memory is kept
Array = Any


class _Kept(threading.local):
    """Memory for the blocks of a thread, kept from one to the next.

    Fresh memory for a block of a batch costs more than the arithmetic on it: every page of it is faulted in.
    """

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def block(self, name: str, like: Tensor) -> Tensor | None:
        """Uninitialised memory of this shape; None for a block that is small enough for fresh memory, or too large
        to be kept.
        """
        size = like.numel()
        if not SMALL < size <= LARGE:
            return None
        flat = self.flat.get((name, like.dtype))
        if flat is None or flat.numel() < size:
            flat = self.flat[name, like.dtype] = torch.empty(size, dtype=like.dtype)
        return flat[:size].view(like.shape)


_KEPT = _Kept()


def _softmax(logits: Tensor, name: str) -> Tensor:
    out = _KEPT.block(name, logits)
    if out is not None and not logits.is_contiguous():
        copy = _KEPT.block("copy", logits)
        assert copy is not None
        logits = copy.copy_(logits)
    return torch.softmax(logits, dim=-1, out=out)


class _Side:
    """One model's decision law at every position."""

    def __init__(self, logits: Tensor, what: str) -> None:
        self.logits, self.what = logits, what
        self.rows = logits.numpy()
        self.argmax: Array = self.rows.argmax(axis=-1)
        self._law: Tensor | None = None
        self._below: Tensor | None = None
        self.largest: Array = None  # the highest probability of each position, once the law is there

    def law(self) -> Tensor:
        if self._law is None:
            self._law = _softmax(self.logits, self.what)
            self.largest = self._at(self.argmax)
            if not np.isfinite(self.largest).all():
                raise InputError(
                    f"{self.what} has NaN, +inf or only -inf; logits must be finite, with -inf only for masked tokens"
                )
        return self._law

    def _at(self, token: Array) -> Array:
        assert self._law is not None
        size = self.rows.shape[-1]
        starts = np.arange(0, token.size * size, size).reshape(token.shape)
        return self._law.numpy().reshape(-1)[starts + token]

    def prob(self, token: Array) -> Array:
        self.law()
        return self._at(token)

    def prob_above_zero(self, token: Array) -> Array:
        """As `prob`, but 0 for masked tokens alone: not for one too unlikely for the number format."""
        batch, step = np.ogrid[: token.shape[0], : token.shape[1]]
        floor = np.where(self.rows[batch, step, token] > -np.inf, np.finfo(self.rows.dtype).tiny, 0)
        return np.maximum(self.prob(token), floor.astype(self.rows.dtype))

    def highest(self) -> Array:
        self.law()
        return self.largest

    def logprob(self, token: Array) -> Array:
        batch, step = np.ogrid[: token.shape[0], : token.shape[1]]
        below = self.rows[batch, step, token] - self.rows[batch, step, self.argmax]
        return np.minimum(below + np.log(self.highest()), 0.0)

    def below(self) -> Tensor:
        """Logits less the highest of their position [B, T, V]."""
        if self._below is None:
            top = torch.from_numpy(self.rows.max(axis=-1)).unsqueeze(-1)
            self._below = torch.sub(self.logits, top, out=_KEPT.block("below " + self.what, self.logits))
        return self._below

    def cross_entropy(self, other: _Side) -> Array:
        """-sum p log r of this law p with another's r [B, T]; +inf where p gives a token that r forbids."""
        law, below = self.law().numpy(), other.below().numpy()
        other.law()
        with np.errstate(invalid="ignore"):
            mean = _products(law, below)
        if not np.isfinite(mean).all():  # masked tokens: no 0 * inf
            mean = _products(law, np.where(law == 0, 0, below))
        return -np.log(other.largest) - mean

    def entropy(self) -> Array:
        return np.maximum(self.cross_entropy(self), 0.0)


def _products(left: Array, right: Array) -> Array:
    return np.vecdot(left, right) if hasattr(np, "vecdot") else np.einsum("...v,...v->...", left, right)


def _kl(first: _Side, second: _Side) -> Array:
    return np.maximum(first.cross_entropy(second) - first.cross_entropy(first), 0.0)


_FORMULAS: dict[str, Callable[[_Side, _Side, Array], Array]] = {
    "drafter_max": lambda q, p, x: q.highest(),
    "verifier_max": lambda q, p, x: p.highest(),
    "drafter_argmax": lambda q, p, x: q.argmax,
    "verifier_argmax": lambda q, p, x: p.argmax,
    "drafter_at_verifier_argmax": lambda q, p, x: q.prob(p.argmax),
    "verifier_at_drafter_argmax": lambda q, p, x: p.prob(q.argmax),
    "drafter_entropy": lambda q, p, x: q.entropy(),
    "verifier_entropy": lambda q, p, x: p.entropy(),
    "cross_entropy": lambda q, p, x: p.cross_entropy(q),
    "kl": lambda q, p, x: _kl(p, q),
    "reverse_kl": lambda q, p, x: _kl(q, p),
    "tv": lambda q, p, x: (q.argmax != p.argmax).astype(q.rows.dtype),
    "token": lambda q, p, x: x,
    "drafter_logprob": lambda q, p, x: q.logprob(x),
    "verifier_logprob": lambda q, p, x: p.logprob(x),
}


def decides(rule: Rule, drafter: Tensor, verifier: Tensor, extra: frozenset[str] = frozenset()) -> bool:
    """Whether `decide` works for this rule and these logits, with ``extra`` fields."""
    return isinstance(rule, PositionRule | TokenRule) and knows(
        (rule.needs | extra) - CONTEXT_FIELDS, drafter, verifier
    )


def decide(
    rule: Rule,
    drafter: Tensor,
    verifier: Tensor,
    token: Tensor,
    context: Mapping[str, Tensor],
    extra: frozenset[str] = frozenset(),
) -> tuple[Tensor, Summary]:
    """Which drafted tokens a position or token rule defers, bool [B, T], and the summary that it read.

    Args:
        context: what `rule.needs` and ``extra`` name of the fields that logits do not give.
        extra: further fields of the summary.

    Raises:
        InputError: logits that are not finite.
    """
    q, p = _Side(drafter.detach(), "drafter_logits"), _Side(verifier.detach(), "verifier_logits")
    fields, drafted = rule.needs | extra, token.numpy()
    columns = {
        name: context[name] if name in CONTEXT_FIELDS else torch.from_numpy(_FORMULAS[name](q, p, drafted))
        for name in fields
    }
    summary = Summary(columns)
    if isinstance(rule, TokenRule):
        probs = [torch.from_numpy(side.prob_above_zero(drafted)) for side in (q, p)]
        deferred = ~rule.keep_probs(probs[0].unsqueeze(-1), probs[1].unsqueeze(-1), summary).squeeze(-1)
    else:
        assert isinstance(rule, PositionRule)
        deferred = rule.defer(summary)
    return deferred.expand(token.shape), summary


def knows(needs: frozenset[str], drafter: Tensor, verifier: Tensor) -> bool:
    """Whether these fields of these logits can be read here."""
    same = drafter.dtype == verifier.dtype and drafter.dtype in (torch.float32, torch.float64)
    return np is not None and same and drafter.device.type == "cpu" and needs <= frozenset(_FORMULAS)


def summarize_greedy(fields: frozenset[str], drafter: Tensor, verifier: Tensor, token: Tensor) -> Summary:
    """The fields of a block at temperature 0, where :func:`knows` holds; no gradient.

    Args:
        drafter, verifier: decision logits [B, T, V], from which greedy tokens are taken as they are.
        token: [B, T].

    Raises:
        InputError: logits that are not finite.
    """
    q, p = _Side(drafter.detach(), "drafter_logits"), _Side(verifier.detach(), "verifier_logits")
    drafted = token.numpy()
    return Summary({name: torch.from_numpy(_FORMULAS[name](q, p, drafted)) for name in fields})
