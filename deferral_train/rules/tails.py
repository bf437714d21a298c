"""Distributions on logged candidate tokens, with bounds on the probability of the unlogged tail.

With tail masses t_q, t_p and the exact D_TV, the tail's excess d = sum_tail (q - p)+ and its overlap o = t_q
- d are known exactly. Two stand-ins for the tail bracket everything computed here: *dispersed*, the pseudo
tokens (q, p) = (o, o), (d, 0), (0, t_p - o), and *merged*, (t_q, o), (0, t_p - o). Both keep the masses and
D_TV.
Shapes: N positions, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.summary import Summary

HALF_ROUNDOFF = 2.0**-11  # unit roundoff of float16


@dataclass(frozen=True)
class Candidates:
    """Logged tokens of each position.

    Attributes:
        ids: [N, K] int64, no id twice in a row; -1 marks an empty place.
        drafter_logprobs, verifier_logprobs: log q and log p (decision distributions) [N, K]; -inf at empty places.
        drafter_least, verifier_least: [N], no token outside has a higher log q, or log p: the last of each
            model's own top list.
    """

    ids: Tensor
    drafter_logprobs: Tensor
    verifier_logprobs: Tensor
    drafter_least: Tensor
    verifier_least: Tensor

    @classmethod
    def union(
        cls,
        drafter_ids: Tensor,
        drafter_top: tuple[Tensor, Tensor],
        verifier_ids: Tensor,
        verifier_top: tuple[Tensor, Tensor],
    ) -> Candidates:
        """Join both models' top tokens, each once.

        Args:
            drafter_ids, verifier_ids: [N, K], each model's top ids, likeliest first.
            drafter_top, verifier_top: (log q, log p) of those ids, [N, K] each.
        """
        # By search, not by comparing all with all: that would take N K^2 bytes, 1 GB for a thousand rows of 1,024.
        known = drafter_ids.sort(dim=-1).values
        place = torch.searchsorted(known, verifier_ids.contiguous()).clamp_(max=known.shape[-1] - 1)
        again = known.gather(-1, place) == verifier_ids
        ids = torch.cat([drafter_ids, verifier_ids.masked_fill(again, -1)], dim=-1).long()
        drafter = torch.cat([drafter_top[0], verifier_top[0].masked_fill(again, -torch.inf)], dim=-1)
        verifier = torch.cat([drafter_top[1], verifier_top[1].masked_fill(again, -torch.inf)], dim=-1)
        return cls(ids, drafter, verifier, drafter_top[0][..., -1], verifier_top[1][..., -1])

    @classmethod
    def top(cls, distributions: Distributions, k: int) -> dict[str, Tensor]:
        """Each model's K likeliest tokens at positions [N], likeliest first, as the columns that traces log.

        Returns:
            ``{model}_top_ids`` int32 and ``{model}_top_{other}_logprobs`` float16, [N, K] each: what either model gives
            them; ``{model}_tail`` [N], the probability of all other tokens.
        """
        columns: dict[str, Tensor] = {}
        given = {"drafter": distributions.drafter_logprobs, "verifier": distributions.verifier_logprobs}
        for model, logprobs in given.items():
            # Ranked by logits: log probabilities of tokens that differ may round to the same.
            ids = getattr(distributions, f"{model}_logits").topk(k, dim=-1).indices
            columns[f"{model}_top_ids"] = ids.int()
            columns[f"{model}_tail"] = (1 - logprobs.gather(-1, ids).exp().sum(dim=-1)).clamp(0.0, 1.0)
            for other, theirs in given.items():
                columns[f"{model}_top_{other}_logprobs"] = theirs.gather(-1, ids).half()
        return columns

    @property
    def valid(self) -> Tensor:
        """Places that hold a token, bool [N, K]."""
        return self.ids >= 0

    @property
    def drafter_rest(self) -> Tensor:
        """The drafter's probability of all other tokens, [N]."""
        return (1 - self.drafter_logprobs.exp().sum(dim=-1)).clamp(0.0, 1.0)

    @property
    def verifier_rest(self) -> Tensor:
        """The verifier's probability of all other tokens, [N]."""
        return (1 - self.verifier_logprobs.exp().sum(dim=-1)).clamp(0.0, 1.0)

    @property
    def rounding(self) -> Tensor:
        """Most by which float16 can have moved the candidates' probability under either model, [N].

        A stored log-probability x is off by at most |x| u, u the unit roundoff: sum p (exp(|log p| u) - 1).
        """
        bounds = []
        for logprobs in (self.drafter_logprobs, self.verifier_logprobs):
            finite = logprobs.clamp(min=-1e4)  # exp of it is 0 as well
            bounds.append((finite.exp() * torch.expm1(finite.abs() * HALF_ROUNDOFF)).sum(dim=-1))
        return torch.maximum(*bounds)

    def with_token(self, token: Tensor, drafter_logprob: Tensor, verifier_logprob: Tensor) -> Candidates:
        """The candidates and one more token per position [N] (a gold token), unless it is among them."""
        absent = ~(self.ids == token.unsqueeze(-1)).any(dim=-1, keepdim=True)

        def append(values: Tensor, more: Tensor, empty: float) -> Tensor:
            return torch.cat([values, torch.where(absent, more.unsqueeze(-1).to(values), empty)], dim=-1)

        return Candidates(
            append(self.ids, token, -1),
            append(self.drafter_logprobs, drafter_logprob, -torch.inf),
            append(self.verifier_logprobs, verifier_logprob, -torch.inf),
            self.drafter_least,
            self.verifier_least,
        )


@dataclass(frozen=True)
class TailedDistributions:
    """Sampling distributions on candidates with the tail's masses.

    Attributes:
        q, p: [N, K].
        excess: d, [N]; overlap: o, [N]; verifier_rest: t_p - o, [N].
        slack: [N], how far the tail masses themselves are unknown (0 at temperature 1).
    """

    q: Tensor
    p: Tensor
    excess: Tensor
    overlap: Tensor
    verifier_rest: Tensor
    slack: Tensor

    @classmethod
    def of(cls, candidates: Candidates, tv: Tensor, temperature: float) -> TailedDistributions:
        """Distributions at a temperature in (0, 1]; `tv` [N] is of those distributions.

        Below 1 a tail's share after tempering is only bounded, by its mass and its likeliest token; the
        middle of the bounds is taken and half their distance given as slack.

        Raises:
            InputError: a temperature above 1, where the tail's share has no useful bound.
        """
        if not 0 < temperature <= 1:
            raise InputError(
                f"temperature {temperature}: logged candidates bound a token rule's distribution at temperatures "
                "0 to 1 only; measure it with decode"
            )
        q, tail_q, slack_q = _tempered(candidates.drafter_logprobs, candidates.drafter_least, temperature)
        p, tail_p, slack_p = _tempered(candidates.verifier_logprobs, candidates.verifier_least, temperature)
        logged = (q - p).clamp(min=0.0).sum(dim=-1)
        # Rounding in the log (half precision) may leave d slightly outside what the masses allow.
        excess = torch.minimum((tv.double() - logged).clamp(min=0.0), tail_q)
        overlap = torch.minimum(tail_q - excess, tail_p)
        return cls(q, p, excess, overlap, tail_p - overlap, slack_q + slack_p)

    def with_single_tail(self) -> tuple[Tensor, Tensor]:
        """(q, p) with the tail merged into one token: a coarser pair, whose D_TV may be smaller, [N, K+1]."""
        tail_q, tail_p = self.overlap + self.excess, self.overlap + self.verifier_rest
        return (
            torch.cat([self.q, tail_q.unsqueeze(-1)], dim=-1),
            torch.cat([self.p, tail_p.unsqueeze(-1)], dim=-1),
        )

    def with_tail(self, dispersed: bool) -> tuple[Tensor, Tensor]:
        """(q, p) with the tail's pseudo tokens appended, [N, K+3] or [N, K+2]."""
        zero = torch.zeros_like(self.excess)
        if dispersed:
            tail_q, tail_p = [self.overlap, self.excess, zero], [self.overlap, zero, self.verifier_rest]
        else:
            tail_q, tail_p = [self.overlap + self.excess, zero], [self.overlap, self.verifier_rest]
        return (
            torch.cat([self.q, torch.stack(tail_q, dim=-1)], dim=-1),
            torch.cat([self.p, torch.stack(tail_p, dim=-1)], dim=-1),
        )


def _tempered(logprobs: Tensor, least: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate probabilities, tail mass and its uncertainty after dividing logits by the temperature."""
    tail = (1 - logprobs.exp().sum(dim=-1)).clamp(min=0.0)
    if temperature == 1:
        return logprobs.exp(), tail, torch.zeros_like(tail)
    powered = (logprobs / temperature).exp()
    logged = powered.sum(dim=-1)
    # The sum of q^(1/T) over a tail whose tokens are at most `least`.
    most = tail * (least * (1 / temperature - 1)).exp()
    middle = logged + most / 2
    return powered / middle.unsqueeze(-1), most / 2 / middle, most / (logged + most) / 2


def align(summary: Summary, candidates: Candidates) -> tuple[Summary, Candidates]:
    """Both argmaxes with the summary's own probabilities in place of the logged ones.

    Candidates are logged in half precision; a threshold at max p must not be missed by the argmax itself.
    """
    drafter, verifier = candidates.drafter_logprobs, candidates.verifier_logprobs
    columns: dict[str, Tensor] = {}
    for who in ("drafter", "verifier"):
        if f"{who}_max" not in summary:
            continue
        top = summary[f"{who}_max"].double().log()
        columns[f"{who}_max"] = top.exp()
        if f"{who}_argmax" in summary:
            here = candidates.ids == summary[f"{who}_argmax"].unsqueeze(-1)
            if who == "drafter":
                drafter = torch.where(here, top.unsqueeze(-1), drafter)
            else:
                verifier = torch.where(here, top.unsqueeze(-1), verifier)
    return summary.with_fields(columns), replace(
        candidates, drafter_logprobs=drafter, verifier_logprobs=verifier
    )


def tailed(
    summary: Summary, candidates: Candidates | None, temperature: float, rule: str
) -> tuple[Summary, TailedDistributions, Candidates]:
    """Summary, distributions and candidates of logged positions at a temperature above 0, made to agree.

    Raises:
        InputError: no candidates; a temperature above 1.
    """
    summary, candidates = align(summary, needs_candidates(candidates, rule))
    tv = summary["tv"] if "tv" in summary else torch.zeros(summary.shape, dtype=torch.float64)
    return summary, TailedDistributions.of(candidates, tv, temperature), candidates


Estimate = tuple[Tensor, Tensor]  # a value and how far the truth may be from it; NaN where no bound is known


def exact(value: Tensor) -> Estimate:
    """A known value as an estimate: the value with a bound of zero."""
    return value, torch.zeros_like(value)


def between(low: Tensor, high: Tensor, slack: Tensor) -> Estimate:
    """The middle of a range; its half width, and `slack` beyond."""
    return (low + high) / 2, (high - low).clamp(min=0.0) / 2 + slack


def unbounded(first: Tensor, second: Tensor) -> Estimate:
    """The mean of two stand-ins for the truth, with no bound."""
    return (first + second) / 2, torch.full_like(first, torch.nan)


def needs_candidates(candidates: Candidates | None, rule: str) -> Candidates:
    """The candidates, or InputError where a rule cannot be scored without them."""
    if candidates is None:
        raise InputError(f"rule {rule}: its distribution needs logged candidates; pass candidates=")
    return candidates


def argmax_logprobs(summary: Summary) -> tuple[Tensor, Tensor]:
    """(log q, log p) of the drafter's argmax as one candidate, [N, 1] each."""
    return (
        summary["drafter_max"].double().log().unsqueeze(-1),
        summary["verifier_at_drafter_argmax"].double().log().unsqueeze(-1),
    )
