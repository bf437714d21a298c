"""Calibrated speculative decoding: drafted tokens that are often rejected for the same token of the verifier are let
through where the verifier holds them likely enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.rules.base import Dial, TokenRule, register
from deferral_train.rules.summary import Summary

MOST_TOKENS = 1 << 31  # keys of two ids stay below 2^62


class RejectedPairs(nn.Module):
    """Counts of pairs: how often the drafter's token stood where the verifier's argmax was another.

    Args:
        drafted: the drafter's token of each pair, int64 [E]; no pair twice.
        verifier: the verifier's argmax, int64 [E].
        counts: how often, int64 [E].
        metadata: where the counts are from: ``pair`` (fingerprints), ``positions`` looked at, ``rejections`` found.

    Raises:
        InputError: columns of unequal length, ids or counts that cannot be.
    """

    role = "table"  # how messages call it
    keys: Tensor
    counts: Tensor

    def __init__(
        self, drafted: Tensor, verifier: Tensor, counts: Tensor, metadata: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        columns = [torch.as_tensor(one) for one in (drafted, verifier, counts)]
        if any(
            one.dim() != 1 or one.dtype.is_floating_point or len(one) != len(columns[0]) for one in columns
        ):
            raise InputError(
                "rejected pairs: drafted, verifier and counts must be integer columns of one length"
            )
        drafted, verifier, counts = (one.long() for one in columns)
        ids = torch.cat([drafted, verifier])
        if bool(((ids < 0) | (ids >= MOST_TOKENS)).any()) or bool((counts < 1).any()):
            raise InputError("rejected pairs: ids must be 0 or more and below 2^31, counts 1 or more")
        keys, order = (verifier * MOST_TOKENS + drafted).sort()
        if bool((keys[1:] == keys[:-1]).any()):
            raise InputError("rejected pairs: a pair is given twice; add its counts")
        self.register_buffer("keys", keys)
        self.register_buffer("counts", counts[order])
        self.metadata = dict(metadata or {})

    @classmethod
    def counted(cls, drafted: Tensor, verifier: Tensor, metadata: Mapping[str, Any] | None = None) -> Self:
        """Of both models' greedy tokens [N]; a pair is counted where they differ."""
        differ = drafted != verifier
        keys, counts = (verifier[differ].long() * MOST_TOKENS + drafted[differ].long()).unique(
            return_counts=True
        )
        found = {"positions": len(drafted), "rejections": int(counts.sum())}
        return cls(keys % MOST_TOKENS, keys // MOST_TOKENS, counts, {**found, **(metadata or {})})

    def times(self, drafted: Tensor, verifier: Tensor) -> Tensor:
        """How often tokens were rejected for others, int64; 0 for a pair that never was.

        Args:
            drafted, verifier: ids of shapes that broadcast together.
        """
        if self.keys.device != drafted.device:
            self.to(drafted.device)
        key = torch.add(drafted, verifier, alpha=MOST_TOKENS)
        if not len(self.keys):
            return torch.zeros_like(key)
        place = torch.searchsorted(self.keys, key).clamp_(max=len(self.keys) - 1)
        return self.counts[place] * (self.keys[place] == key)


@register
@dataclass(frozen=True, eq=False)
class CSD(TokenRule):
    """Calibrated speculative decoding (arXiv 2604.13634): keep v iff the pair (v, v_p) was rejected at least ``least``
    times and log p(v) - log p(v_p) >= log ratio.

    Published for a drafted token that the exact check has rejected, with counts that go on while decoding, a count
    above lambda and ratio 0.01; here the table is counted beforehand and stays as it is. At temperature 0 both are the
    same but for that. When sampling, tokens that are not kept are checked against pi_Token, equation (11), which is
    stricter than the published check against p. At ratio 1.1 nothing is kept.
    """

    name: ClassVar[str] = "csd"
    dial: ClassVar[Dial] = Dial("ratio", 0.0, 1.1, lossless=1.1, drafter=None, sweep=(0.0, 1.0))
    needs: ClassVar[frozenset[str]] = frozenset({"verifier_argmax", "verifier_max"})

    table: Any = None
    ratio: float = 0.01
    least: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.table, RejectedPairs):
            raise InputError(
                f"rule csd: table is {type(self.table).__name__}; write csd:table=FILE, of "
                "`deferral-train count-rejections`, or pass RejectedPairs"
            )
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 1:
            raise InputError(f"rule csd: least is {self.least!r}; give an integer of at least 1")

    def keep(self, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary) -> Tensor:
        """Bool [.., V]: of the whole vocabulary, in order."""
        return self.keep_tokens(None, drafter_logprobs, verifier_logprobs, summary)

    def keep_tokens(
        self, tokens: Tensor | None, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary
    ) -> Tensor:
        """Bool [.., K]."""
        if tokens is None:
            tokens = torch.arange(verifier_logprobs.shape[-1], device=verifier_logprobs.device)
        best, most = (summary[name].unsqueeze(-1) for name in ("verifier_argmax", "verifier_max"))
        often = self.table.times(tokens, best.long()) >= self.least
        return often & (verifier_logprobs.exp() >= self.ratio * most)
