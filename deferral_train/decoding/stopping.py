"""When to stop drafting: adaptive draft length behind one interface.

A stop rule is asked after each drafted token whether the row should draft beyond it. It sees what the
drafter sees, nothing of the verifier, so that it never changes which distribution a drafted token follows, only how far
a block reaches (and with it, under lossy rules, where the verifier's bonus tokens fall).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deferral_train.decoding.drafting.speed import SpeedModel
from deferral_train.errors import InputError
from deferral_train.rules.summary import (
    CONTEXT_FIELDS,
    FIELDS,
    PREVIOUS_TOKENS,
    Summary,
    summarize,
)


@dataclass(frozen=True)
class DraftStep:
    """One drafted token of each row.

    Attributes:
        place: 0-based place in the block.
        token: [B] ids.
        logits: [B, V] the drafter's decision logits that gave it.
        sampling: [B, V] logits after temperature and truncation, or None.
        temperature: of the sampling distribution.
        hidden: [B, D] the drafter's hidden state there, where a tap is set.
        generated: tokens that each row had emitted before this block.
        previous: gives the token [B] so many places before this one, -1 where that is none generated.
    """

    place: int
    token: Tensor
    logits: Tensor
    sampling: Tensor | None
    temperature: float
    hidden: Tensor | None
    generated: Sequence[int]
    previous: Callable[[int], Tensor]

    def summary(self, fields: frozenset[str]) -> Summary:
        """The drafter's side of the summary at this position, leading shape [B]."""
        computed = summarize(
            self.logits,
            self.logits,
            temperature=self.temperature,
            drafter_sampling_logits=self.sampling,
            verifier_sampling_logits=self.sampling,
            token=self.token,
            fields=fields - CONTEXT_FIELDS,
        )
        return computed.with_fields(self._context(fields))

    def _context(self, fields: frozenset[str]) -> dict[str, Tensor]:
        given: dict[str, Tensor] = {}
        if "drafter_hidden" in fields and self.hidden is not None:
            given["drafter_hidden"] = self.hidden
        if "draft_position" in fields:
            given["draft_position"] = torch.full_like(self.token, self.place)
        if "position" in fields:
            generated = torch.tensor(list(self.generated), device=self.token.device)
            given["position"] = generated + self.place
        for back, name in enumerate(PREVIOUS_TOKENS, start=1):
            if name in fields:
                given[name] = self.previous(back)
        return given

    def logprob(self) -> Tensor:
        """log q(x) of the drafted tokens under the decision distribution, [B]."""
        return torch.log_softmax(self.logits, dim=-1).gather(1, self.token[:, None])[:, 0]


class StopDrafting:
    """Interface: subclasses answer :meth:`stops`; the others have nothing to do unless a state is kept."""

    needs: frozenset[str] = frozenset()

    def start(self, rows: int, num_draft_tokens: int) -> None:
        """A call with ``rows`` rows begins."""

    def stops(self, step: DraftStep) -> Tensor:
        """True where the row drafts no further than this token, bool [B]."""
        raise NotImplementedError

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """A block was verified: drafted and emitted tokens per row."""


def _probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{name} is {value}; give a probability between 0 and 1")


@dataclass
class ConfidenceStop(StopDrafting):
    """Stop once the drafted token's probability is below ``threshold`` (transformers' assistant
    threshold).
    """

    threshold: float = 0.4

    def __post_init__(self) -> None:
        _probability("stop threshold", self.threshold)

    def stops(self, step: DraftStep) -> Tensor:
        return step.logprob().exp() < self.threshold


@dataclass
class CumulativeStop(StopDrafting):
    """Stop once the probability of the whole block, prod q(x), is below ``threshold``."""

    threshold: float = 0.2
    _sum: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _probability("stop threshold", self.threshold)

    def stops(self, step: DraftStep) -> Tensor:
        logprob = step.logprob().double()
        self._sum = logprob if step.place == 0 or self._sum is None else self._sum + logprob
        return self._sum < (math.log(self.threshold) if self.threshold else -math.inf)


@dataclass
class EntropyStop(StopDrafting):
    """Stop once 1 - sqrt(weight * H(q)), a lower bound on acceptance, is below ``threshold``.

    Source: AdaEDL (Agrawal et al. 2024): acceptance is at least 1 - sqrt(weight * H(q)), H in nats.
    """

    threshold: float = 0.4
    weight: float = 0.2

    def __post_init__(self) -> None:
        _probability("stop threshold", self.threshold)
        if self.weight < 0:
            raise InputError(f"stop weight is {self.weight}; give a number >= 0")

    def stops(self, step: DraftStep) -> Tensor:
        entropy = step.summary(frozenset({"drafter_entropy"})).drafter_entropy
        return 1.0 - (self.weight * entropy).sqrt() < self.threshold


@dataclass
class HeadStop(StopDrafting):
    """Stop once a draft-stage head expects a rejection: predicted r * D_TV above ``threshold``.

    The head predicts the loss gap and D_TV from the drafter alone; a position that it would not defer is
    never rejected, one that it defers is rejected with probability D_TV (Lemma 3).

    Raises:
        InputError: a head of the verify stage.
    """

    head: Any
    alpha: float
    threshold: float = 0.5

    def __post_init__(self) -> None:
        _probability("stop threshold", self.threshold)
        if self.head.stage != "draft":
            raise InputError(f"stop head has stage {self.head.stage!r}: stopping a draft needs stage 'draft'")
        if getattr(self.head, "head_type", None) == "judge":
            raise InputError("stop head: a judge head knows no gap; use acceptance:head=FOLDER,threshold=0.7")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Summary fields that the head reads."""
        return frozenset(self.head.features)

    def rejection(self, step: DraftStep) -> Tensor:
        """Predicted probability of a rejection at this position, [B]."""
        summary = step.summary(self.needs)
        with torch.inference_mode():
            tv = self.head.tv(summary).clamp(0.0, 1.0)
            deferred = self.head.gap(summary) > self.alpha * tv
        return tv * deferred

    def stops(self, step: DraftStep) -> Tensor:
        return self.rejection(step) > self.threshold


@dataclass
class AcceptanceStop(StopDrafting):
    """Stop once the chance of a rejection in the block, 1 - prod p^_i, is above ``threshold``.

    p^_i is a judge head's probability that the verifier accepts the i-th drafted token. Source: SpecDec++ (Huang et
    al. 2024, arXiv 2405.19715), whose h it is; `drafting.stop_fit.fit_acceptance` fits it on traces.

    Args:
        threshold: default: stored in the head, else 0.7.

    Raises:
        InputError: a head without acceptance predictions, or of the verify stage.
    """

    head: Any
    threshold: float | None = None
    _passes: Tensor | None = field(default=None, init=False, repr=False)
    _limit: float = field(default=0.7, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(getattr(self.head, "score", None)):
            kind = getattr(self.head, "head_type", type(self.head).__name__)
            raise InputError(
                f"stop head: a {kind} head predicts no acceptance; fit a judge head of stage 'draft'"
            )
        if self.head.stage != "draft":
            raise InputError(f"stop head has stage {self.head.stage!r}: stopping a draft needs stage 'draft'")
        stored = (getattr(self.head, "metadata", None) or {}).get("threshold", self._limit)
        self.threshold = self._limit = stored if self.threshold is None else self.threshold
        _probability("stop threshold", self._limit)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Summary fields that the head reads."""
        return frozenset(self.head.features)

    def stops(self, step: DraftStep) -> Tensor:
        with torch.inference_mode():
            chance = self.head.score(step.summary(self.needs)).double()
        first = step.place == 0 or self._passes is None
        self._passes = chance if first else self._passes * chance
        return 1 - self._passes > self._limit


@dataclass
class ExpectedSpeedStop(StopDrafting):
    """Draft on while one more token is expected to raise tokens per second.

    With acceptance probabilities a_1.. of the block so far, a block of n drafted tokens is expected to emit
    E_n = 1 + sum_{j<=n} prod_{i<=j} a_i tokens and to cost n * cost + 1 verifier passes; it goes on while
    E_{n+1} / (1 + (n+1) cost) > E_n / (1 + n cost), taking a_{n+1} = a_n.

    Args:
        cost: measured time of one drafter pass over that of one verifier pass.
        head: a draft-stage head for a_i = 1 - predicted rejection; without one a_i is the drafted token's own
            probability, mixed with the acceptance observed so far.
        alpha: the head's dial.
    """

    cost: float
    head: Any = None
    alpha: float = 0.0
    _reach: Tensor | None = field(default=None, init=False, repr=False)
    _expected: Tensor | None = field(default=None, init=False, repr=False)
    _seen: list[int] = field(default_factory=lambda: [4, 5], init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.cost < math.inf:
            raise InputError(f"stop cost is {self.cost}; give drafter time / verifier time, above 0")
        self._model = SpeedModel.of_passes(drafter=self.cost, verifier=1.0)
        self._rejects = HeadStop(self.head, self.alpha) if self.head is not None else None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Summary fields that the head reads."""
        return self._rejects.needs if self._rejects is not None else frozenset()

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        self._seen[0] += sum(accepted)
        self._seen[1] += sum(min(a + 1, p) for p, a in zip(proposed, accepted))

    def stops(self, step: DraftStep) -> Tensor:
        chance = self._acceptance(step)
        if step.place == 0 or self._reach is None or self._expected is None:
            self._reach, self._expected = torch.ones_like(chance), torch.ones_like(chance)
        self._reach = self._reach * chance
        self._expected = self._expected + self._reach
        now, longer = (float(self._model.round(step.place + more)) for more in (1, 2))
        return (self._expected + self._reach * chance) / longer <= self._expected / now

    def _acceptance(self, step: DraftStep) -> Tensor:
        if self._rejects is not None:
            return 1.0 - self._rejects.rejection(step)
        observed = self._seen[0] / self._seen[1]
        return 0.5 * (step.logprob().exp() + observed)


def check_stop(stop: Any) -> None:
    """Refuse what is not a stop rule, or one that asks for what a drafter cannot know."""
    if not isinstance(stop, StopDrafting):
        raise InputError(f"stop is {type(stop).__name__}; give a StopDrafting such as ConfidenceStop(0.4)")
    unseen = [name for name in stop.needs if FIELDS[name].sees not in ("drafter", "context")]
    if unseen:
        raise InputError(f"stop reads {', '.join(sorted(unseen))}, which only the verifier sees")
