"""Memory: how often each token followed the same last tokens in the fit traces, counted exactly.

Two n-gram-like models cannot tell a head more about P than their own samples did; gold tokens of the traces can.
Feature ``memory_k`` looks up what followed the last k tokens. It is the count-based relative of
nearest-neighbour language models (Khandelwal et al., 2020, arXiv 1911.00172). N rows, E remembered keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.rules.summary import PREVIOUS_TOKENS, Summary

ORDERS = {f"memory_{k}": k for k in range(1, len(PREVIOUS_TOKENS) + 1)}
WIDTH = 4
FIELDS_READ = {
    name: (*PREVIOUS_TOKENS[:order], "drafter_argmax", "verifier_argmax") for name, order in ORDERS.items()
}
MAX_ENTRIES = 50_000_000
PRIOR = 8.0  # rows that the prior of a share weighs; the body sees the count beside and can undo it
_PRIME = (1 << 31) - 1
_FACTORS = (1_103_515_245, 1_812_433_253)


class Memory(nn.Module):
    """Counts of contexts (the last k tokens) and of (context, next token), as sorted keys and their counts.

    Keys are 62-bit hashes of token ids: with a million keys two collide with probability 1e-7. Nothing is
    stored of the text but these counts.

    Args:
        entries: E, keys to make room for; 0 until :meth:`fit`.
    """

    keys: Tensor
    counts: Tensor

    def __init__(self, entries: int = 0) -> None:
        super().__init__()
        if not 0 <= entries <= MAX_ENTRIES:
            raise InputError(f"memory_entries={entries}: allowed are 0 to {MAX_ENTRIES}")
        self.register_buffer("keys", torch.zeros(entries, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(entries, dtype=torch.int32))

    @property
    def entries(self) -> int:
        """E, keys that are remembered."""
        return len(self.keys)

    @torch.no_grad()
    def fit(self, summary: Summary, gold: Tensor, orders: Sequence[int]) -> None:
        """Count gold tokens ``[N]`` behind the previous tokens of ``summary``; what was counted before is dropped."""
        keys = []
        for order in orders:
            context = _context(summary, order)
            keys += [_sealed(context), _sealed(_extended(context, gold))]
        self.keys, counts = torch.cat(keys).unique(sorted=True, return_counts=True)
        self.counts = counts.to(torch.int32)
        if self.entries > MAX_ENTRIES:
            raise InputError(
                f"{self.entries} contexts to remember, at most {MAX_ENTRIES}; use lower memory_k"
            )

    def columns(self, summary: Summary, order: int, leave_out: Tensor | None = None) -> Tensor:
        """Counts of the last ``order`` tokens, ``[.., 4]``: log(1 + n), shares of v_p and of v_q, their difference.

        Args:
            leave_out: gold tokens ``[..]`` of rows that were counted themselves: each sees the memory without itself,
                as it will when it is new.
        """
        context = _context(summary, order)
        best, other = summary["verifier_argmax"], summary["drafter_argmax"]
        n, a, b = (self._count(key) for key in (context, _extended(context, best), _extended(context, other)))
        if leave_out is not None:
            n, a, b = n - 1, a - (leave_out == best).float(), b - (leave_out == other).float()
        weight = n + PRIOR
        return torch.stack([n.log1p(), a / weight, b / weight, (a - b) / weight], dim=-1)

    def _count(self, state: tuple[Tensor, Tensor]) -> Tensor:
        key = _sealed(state)
        if not self.entries:
            return torch.zeros(key.shape, device=key.device)
        place = torch.searchsorted(self.keys, key).clamp_(max=self.entries - 1)
        return torch.where(self.keys[place] == key, self.counts[place], 0).float()

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take the stored size: a memory is as large as what it was fitted on."""
        for name in ("keys", "counts"):
            stored = state.get(prefix + name)
            if stored is not None and stored.dim() == 1:
                setattr(self, name, torch.empty_like(stored, device=self.keys.device))
        super()._load_from_state_dict(state, prefix, *rest)


def _context(summary: Summary, order: int) -> tuple[Tensor, Tensor]:
    """Hash state of the last ``order`` tokens, nearest first."""
    first = summary[PREVIOUS_TOKENS[0]].long()
    state = (torch.full_like(first, order), torch.full_like(first, order))
    for name in PREVIOUS_TOKENS[:order]:
        state = _extended(state, summary[name])
    return state


def _extended(state: tuple[Tensor, Tensor], token: Tensor) -> tuple[Tensor, Tensor]:
    """The hash states after one more token; products stay below 2^62."""
    a, b = ((s * factor + token.long() + 2) % _PRIME for s, factor in zip(state, _FACTORS))
    return a, b


def _sealed(state: tuple[Tensor, Tensor]) -> Tensor:
    return state[0] * (_PRIME + 1) + state[1]
