"""Verification one row at a time, for large vocabularies on a CPU: each input is read once.

At temperature 1 without truncation both softmaxes of a position go to two scratch rows that a core's cache holds;
maxima, D_TV, the check and, at the first rejection, the correction are taken from them at once. Nothing of size
[.., V] is written but three scratch rows. Same verdicts as scoring.py, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.rules.base import PositionRule, Rule, TokenRule
from deferral_train.rules.block import Block
from deferral_train.rules.emission import keep_law
from deferral_train.rules.laws import check_normaliser, places
from deferral_train.rules.sampling import draw
from deferral_train.rules.scoring import check_drawn
from deferral_train.rules.summary import Summary

# Below this the overhead of a Python step per row outweighs the pass over it.
LARGE_VOCABULARY = 16_384
FIELDS_AT_HAND = frozenset({"drafter_max", "verifier_max", "tv", "tv_unscaled", "draft_position"})


@dataclass(frozen=True)
class RowVerdict:
    """accepted [B], deferred [B, T], kept [B, T], and the correction [B] of rejected rows (-1 elsewhere)."""

    accepted: Tensor
    deferred: Tensor
    kept: Tensor
    correction: Tensor


def applies(rule: Rule, block: Block, limited: bool) -> bool:
    """Whether this path knows all that the rule asks for."""
    if limited or block.temperature != 1.0 or block.drafter_logits is None:
        return False
    if block.drafter_sampling_logits is not None or block.verifier_sampling_logits is not None:
        return False
    shape, device = block.verifier_logits.shape, block.verifier_logits.device
    if device.type != "cpu" or shape[-1] < LARGE_VOCABULARY:
        return False
    known = isinstance(rule, PositionRule | TokenRule) and rule.needs <= FIELDS_AT_HAND
    return (rule.is_lossless or known) and block.drafter_logits.dtype == block.verifier_logits.dtype


def verify_rows(rule: Rule, block: Block, uniform: Tensor, last: Tensor) -> RowVerdict:
    """Walk every row. uniform [B, T] and last [B] are the random numbers of the checks and of the next token."""
    rows, drafts = block.drafted.shape
    deferred = torch.zeros(rows, drafts, dtype=torch.bool)
    kept = torch.zeros_like(deferred)
    accepted = torch.zeros(rows, dtype=torch.int64)
    correction = torch.full((rows,), -1, dtype=torch.int64)
    numbers, lengths, tokens = uniform.tolist(), block.lengths.tolist(), block.drafted.tolist()
    step = _Step(rule, block)
    for b in range(rows):
        alive = True
        for t in range(lengths[b]):
            step.read(b, t, tokens[b][t])
            deferred[b, t], kept[b, t] = step.decide(t)
            if not alive:
                continue
            if step.kept or (numbers[b][t] < step.exact and numbers[b][t] < step.ratio()):
                accepted[b] += 1
                continue
            alive = False
            correction[b] = draw(step.residual().unsqueeze(0), last[b : b + 1])[0]
    return RowVerdict(accepted, deferred, kept, correction)


class _Step:
    """One position at a time in three scratch rows [V]."""

    def __init__(self, rule: Rule, block: Block) -> None:
        assert block.drafter_logits is not None
        self.rule, self.drafter, self.verifier = rule, block.drafter_logits, block.verifier_logits
        self.q, self.p, self.scratch = (torch.empty_like(self.verifier[0, 0]) for _ in range(3))

    def read(self, b: int, t: int, token: int) -> None:
        """Both laws of a position, and the exact check's ratio for its token."""
        self.drafter_row, self.verifier_row, self.token = self.drafter[b, t], self.verifier[b, t], token
        torch.softmax(self.drafter_row, 0, out=self.q)
        torch.softmax(self.verifier_row, 0, out=self.p)
        self.q_token, self.p_token = self.q[token].item(), self.p[token].item()
        # One NaN or +inf turns a whole softmax to NaN: any entry tells.
        if self.q_token != self.q_token or self.p_token != self.p_token:
            check_normaliser(self.q[:1], "drafter_logits")
            check_normaliser(self.p[:1], "verifier_logits")
        if self.q_token == 0:
            check_drawn(self.drafter_row[token])
        p, q = self.p_token, self.q_token
        self.exact = 0.0 if p <= 0 else 1.0 if p >= q else p / q
        self.deferred, self.kept, self.eta = True, False, 1.0
        self.kept_tokens: Tensor | None = None

    def decide(self, t: int) -> tuple[bool, bool]:
        """(deferred, kept) of the token in hand."""
        if self.rule.is_lossless:
            return True, False
        self.summary = self._summarise(t)
        if isinstance(self.rule, PositionRule):
            deferred = self.deferred = bool(self.rule.defer(self.summary))
        else:
            assert isinstance(self.rule, TokenRule)
            at = slice(self.token, self.token + 1)
            deferred = not bool(self.rule.keep_probs(self.q[at], self.p[at], self.summary))
        self.kept = not deferred and self.verifier_row[self.token].item() > -torch.inf
        return deferred, self.kept

    def ratio(self) -> float:
        """Probability that a token not kept is emitted: min(1, eta p / q)."""
        if self.rule.is_lossless or isinstance(self.rule, PositionRule):
            return self.exact
        self._eta()
        return min(1.0, self.eta * self.p_token / self.q_token)

    def residual(self) -> Tensor:
        """Weights max(0, pi - q) [V] of the correction; pi where nothing is left."""
        if not self.deferred:
            # Kept, but masked by the verifier: pi - q is a multiple of p on the support, and negative off it.
            return self.p
        kept = None
        if isinstance(self.rule, TokenRule) and not self.rule.is_lossless:
            kept = self._eta()
        torch.mul(self.p, self.eta, out=self.scratch)
        self.scratch.sub_(self.q)
        if kept is not None:
            self.scratch[kept] = self.p[kept] * self.eta
        weights = self.scratch.clamp_(min=0.0)
        if weights.sum().item() > 0:
            return weights
        if kept is None or not len(kept):
            return self.p
        mask = torch.zeros_like(self.p, dtype=torch.bool).index_fill_(0, kept, True)
        return keep_law(self.q, self.p, mask)

    def _eta(self) -> Tensor:
        """Sets eta, the sum of q over tokens not kept; returns the tokens that are kept.

        Kept tokens are few, so that a list of them costs less than passes over a mask.
        """
        if self.kept_tokens is None:
            assert isinstance(self.rule, TokenRule)
            mask = self.rule.keep_probs(self.q, self.p, self.summary)
            kept = places(mask)
            self.kept_tokens = kept[self.verifier_row[kept] > -torch.inf]
            if len(self.kept_tokens):
                self.eta = self.scratch.copy_(self.q).index_fill_(0, self.kept_tokens, 0.0).sum().item()
        return self.kept_tokens

    def _summarise(self, t: int) -> Summary:
        fields: dict[str, Tensor] = {}
        for name in self.rule.needs:
            if name == "draft_position":
                fields[name] = torch.tensor(t)
            elif name in ("tv", "tv_unscaled"):
                torch.sub(self.p, self.q, out=self.scratch)
                fields[name] = (self.scratch.abs_().sum() * 0.5).clamp_(0.0, 1.0)
            else:
                fields[name] = (self.q if name == "drafter_max" else self.p).amax()
        return Summary(fields)
