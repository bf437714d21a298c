"""The distributions of a drafter and a verifier over the same positions: each computed once, and only if it is read.

Both models' logits lie in one tensor, so that one operator serves both: a block of a few positions costs by the number
of operators, not by its size. Nothing here copies to the host but `Distributions.check`. V vocabulary; the leading
shape [..] of positions is free.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError

MODELS = ("drafter", "verifier")
MOST_MARGIN = 1e4  # a masked second token would make it infinite
MOST_NATS = 1e6  # no two models differ by as much, unless one of them masks what the other does not


def as_float(logits: Tensor, what: str) -> Tensor:
    """Logits in the precision they are computed in: float32 and float64 as given, half types as float32.

    Raises:
        InputError: not a floating tensor, or no vocabulary axis.
    """
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
        kind = getattr(logits, "dtype", type(logits).__name__)
        raise InputError(f"{what} is {kind}; pass a float32, float64 or half tensor of logits [.., V]")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise InputError(f"{what} has shape {list(logits.shape)}; the last axis must be the vocabulary")
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def check_temperature(temperature: float) -> float:
    """A finite temperature >= 0 (0 is greedy), else InputError."""
    value = float(temperature)
    if not 0.0 <= value < float("inf"):
        raise InputError(f"temperature is {temperature}; use a finite number >= 0 (0 is greedy)")
    return value


def lowest_argmax(values: Tensor) -> Tensor:
    """The lowest index of the largest entry of the last axis, int64 [..]; a NaN counts as largest.

    torch documents that `argmax` and `max` give the first of equal maxima, on every device.
    """
    return values.argmax(dim=-1)


def gather_token(values: Tensor, token: Tensor) -> Tensor:
    """Each position's value at its token: [.., V] and ids [..] to [..]."""
    return values.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Point masses [.., size] at `index` [..]."""
    distribution = torch.zeros(*index.shape, size, dtype=dtype, device=index.device)
    return distribution.scatter_(-1, index.unsqueeze(-1), 1.0)


def not_finite(values: Tensor) -> Tensor:
    """Where values are NaN or infinite, bool [..]: in two operators, torch's own `isfinite` takes four."""
    return (values - values) != 0


class Distributions:
    """Decision and sampling distributions of both models at some positions.

    Decision distributions are softmax of the decision logits (after logits processors, before temperature and
    truncation). Sampling distributions are softmax(decision logits / temperature), or softmax of the sampling logits
    where these are given (already after temperature and truncation, -inf = never). At temperature 0 they are the
    one-hot of the lowest argmax.

    Tensors of both models ("both") have them along ``axis``: first the drafter, last the verifier.

    Args:
        decision: decision logits of both, [2, .., V] for axis 0.
        temperature: of the sampling distributions; 0 is greedy.
        sampling: sampling logits of both, of the same shape; None where that is ``decision / temperature``.
        axis: where the models lie.
        columns: how many positions of a block [B, 2, W, V] rules are shown; verification alone reads those after.
    """

    def __init__(
        self,
        decision: Tensor,
        temperature: float = 1.0,
        sampling: Tensor | None = None,
        axis: int = 0,
        columns: int | None = None,
    ) -> None:
        self.decision, self.temperature, self.sampling = decision, temperature, sampling
        self.axis, self.columns = axis, columns
        self._sampled_of: tuple[Tensor, Tensor] | None = None
        self._logprobs_of: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        drafter_logits: Tensor,
        verifier_logits: Tensor,
        temperature: float = 1.0,
        drafter_sampling_logits: Tensor | None = None,
        verifier_sampling_logits: Tensor | None = None,
    ) -> Distributions:
        """From each model's logits [.., V]; computed in the wider of their precisions, float32 at least.

        Raises:
            InputError: a shape, a vocabulary or a type that does not fit.
        """
        given = {
            "verifier_logits": verifier_logits,
            "drafter_logits": drafter_logits,
            "drafter_sampling_logits": drafter_sampling_logits,
            "verifier_sampling_logits": verifier_sampling_logits,
        }
        logits = {name: as_float(one, name) for name, one in given.items() if one is not None}
        _check_shapes(logits)
        temperature = check_temperature(temperature)
        decision = torch.stack([logits["drafter_logits"], logits["verifier_logits"]])
        sampling = None
        if drafter_sampling_logits is not None or verifier_sampling_logits is not None:
            scale = temperature or 1.0
            sides = [
                logits[f"{model}_sampling_logits"]
                if f"{model}_sampling_logits" in logits
                else logits[f"{model}_logits"] / scale
                for model in MODELS
            ]
            sampling = torch.stack([side.to(decision.dtype) for side in sides])
        return cls(decision, temperature, sampling)

    def drafter(self, both: Tensor) -> Tensor:
        """The drafter's part of a tensor of both, a view."""
        return self.shown(both).select(self.axis, 0)

    def verifier(self, both: Tensor) -> Tensor:
        """The verifier's part of a tensor of both, a view."""
        return self.shown(both).select(self.axis, -1)

    def shown(self, both: Tensor) -> Tensor:
        """The positions of a tensor of both that rules are shown, a view."""
        return both if self.columns is None else both[:, :, : self.columns]

    def sampled_of(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """q and p of the sampling distributions at one token of each position, [..] each; the latest are kept."""
        if self._sampled_of is None or self._sampled_of[0] is not token:
            index = token.unsqueeze(self.axis).expand(self.shown(self.sampled).shape[:-1])
            self._sampled_of = token, gather_token(self.sampled, index)
        drafter, verifier = self._sampled_of[1].unbind(self.axis)
        return drafter, verifier

    def at(self, index: tuple[Tensor, ...]) -> Distributions:
        """These distributions at some positions (advanced indexing of the leading shape)."""
        assert self.axis == 0
        both: tuple[Any, ...] = (slice(None), *index)
        sampling = None if self.sampling is None else self.sampling[both]
        return Distributions(self.decision[both], self.temperature, sampling)

    def check(self) -> None:
        """Refuse logits that are no distribution: NaN, +inf, or nothing but -inf at a position. One copy to the host.

        Raises:
            InputError: naming the logits and the number of such positions.
        """
        given = {"logits": self.decision, "sampling_logits": self.sampling}
        names = [f"{model}_{what}" for what, one in given.items() if one is not None for model in MODELS]
        peaks = [one.amax(dim=-1) for one in given.values() if one is not None]
        broken = [not_finite(peak).movedim(self.axis, 0).reshape(2, -1) for peak in peaks]
        for name, count in zip(names, torch.cat(broken).sum(dim=1).tolist()):
            if count:
                raise InputError(
                    f"{name} has NaN, +inf or only -inf in {count} position(s); "
                    "logits must be finite, with -inf only for masked tokens"
                )

    @property
    def greedy(self) -> bool:
        """True where the sampling distributions are one-hots."""
        return self.temperature == 0.0

    # Decision distributions, of both

    @cached_property
    def top(self) -> torch.return_types.max:
        """Largest decision logits (``values``) and their lowest places (``indices``), of both."""
        return self.decision.max(dim=-1)

    @property
    def argmax(self) -> Tensor:
        """Lowest argmaxes of the decision logits, int64."""
        return self.top.indices

    @property
    def peak(self) -> Tensor:
        """Largest decision logits."""
        return self.top.values

    @cached_property
    def broken(self) -> Tensor:
        """Where logits are no distribution, bool of both: then their largest is NaN or infinite, and all that softmax
        makes of them is NaN.
        """
        if self.greedy:
            found = not_finite(self.peak)
            return found if self.sampling is None else found | not_finite(self.sampling.amax(dim=-1))
        first = self.sampled[..., 0]
        found = first != first
        return found if self.sampling is None else found | not_finite(self.peak)

    @cached_property
    def probs(self) -> Tensor:
        """q and p, [.., V] each."""
        return torch.softmax(self.decision, dim=-1)

    @cached_property
    def largest_logprob(self) -> Tensor:
        """log max q and log max p."""
        return gather_token(self.probs, self.argmax).log()

    @cached_property
    def largest(self) -> Tensor:
        """max q and max p, rounded as exp of their entries in `logprobs`, so that ties tie."""
        return self.largest_logprob.exp()

    @cached_property
    def logprobs(self) -> Tensor:
        """log q and log p, [.., V] each; never above 0, so that no probability exceeds 1 by rounding."""
        return (self.decision - self.peak.unsqueeze(-1)) + self.largest_logprob.unsqueeze(-1)

    def logprobs_of(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """log q and log p of one token of each position, as in `logprobs`, [..] each; the latest are kept."""
        if self._logprobs_of is None or self._logprobs_of[0] is not token:
            index = token.unsqueeze(self.axis).unsqueeze(-1)
            self._logprobs_of = token, self._logprobs_at(index).squeeze(-1)
        drafter, verifier = self._logprobs_of[1].unbind(self.axis)
        return drafter, verifier

    @cached_property
    def at_argmaxes(self) -> Tensor:
        """Each model's probability of the drafter's and of the verifier's argmax, [.., 2] of both."""
        return self._logprobs_at(self.shown(self.argmax).movedim(self.axis, -1).unsqueeze(self.axis)).exp()

    def _logprobs_at(self, index: Tensor) -> Tensor:
        peak, largest = (self.shown(one).unsqueeze(-1) for one in (self.peak, self.largest_logprob))
        index = index.expand(*peak.shape[:-1], index.shape[-1])
        return (self.decision.gather(-1, index) - peak) + largest

    @cached_property
    def mean_depth(self) -> Tensor:
        """How far below the largest logit of the drafter and of the verifier [.., 2] the tokens of both lie on average.

        Entry (i, j) is sum_v w_i(v) (max_u z_j(u) - z_j(v)), w the probabilities and z the logits. A masked token has a
        finite stand-in for infinity, which keeps 0 * inf out; `nats` knows a sum that has any of it. It is one matrix
        product a position: elementwise products would be written to memory before they are added.
        """
        depth = (self.peak.unsqueeze(-1) - self.decision).clamp_(max=torch.finfo(self.decision.dtype).max / 4)
        probs, depth = (one.movedim(self.axis, -2) for one in (self.probs, depth))
        return (probs @ depth.mT).movedim(-2, self.axis)

    @cached_property
    def entropy(self) -> Tensor:
        """H(q) and H(p), nats."""
        own = self.mean_depth.diagonal(dim1=self.axis, dim2=-1).movedim(-1, self.axis)
        return own - self.largest_logprob

    @cached_property
    def divergence(self) -> Tensor:
        """KL(q||p) and KL(p||q), nats: the means of log q - log p under q and of log p - log q under p."""
        mean = self.shown(self.mean_depth[..., 0] - self.mean_depth[..., 1])
        largest = self.verifier(self.largest_logprob) - self.drafter(self.largest_logprob)
        return nats((mean + largest.unsqueeze(self.axis)).abs())

    @property
    def cross_entropy(self) -> Tensor:
        """-sum_v p log q, nats [..]."""
        return nats(self.verifier(self.mean_depth)[..., 0] - self.drafter(self.largest_logprob))

    @cached_property
    def margin(self) -> Tensor:
        """Largest less second largest logit of both: 0 where two tie.

        At most `MOST_MARGIN`, which stands for a token that alone may be emitted (all others masked).
        """
        if self.decision.shape[-1] == 1:
            return torch.full_like(self.peak, MOST_MARGIN)
        first, second = self.decision.topk(2, dim=-1).values.unbind(-1)
        return (first - second).clamp(max=MOST_MARGIN)

    # Sampling distributions

    @property
    def processed(self) -> Tensor:
        """Logits of both after processing; -inf at the verifier marks tokens that are never emitted."""
        return self.decision if self.sampling is None else self.sampling

    @cached_property
    def best(self) -> Tensor:
        """Greedy tokens of both, int64: the lowest argmaxes after processing."""
        return self.argmax if self.sampling is None else self.sampling.argmax(dim=-1)

    @cached_property
    def sampled(self) -> Tensor:
        """The sampling distributions q and p, [.., V] each."""
        if self.greedy:
            return one_hot(self.best, self.decision.shape[-1], self.decision.dtype)
        if self.sampling is not None:
            return torch.softmax(self.sampling, dim=-1)
        if self.temperature == 1.0:
            return self.probs
        return torch.softmax(self.decision / self.temperature, dim=-1)

    @property
    def q(self) -> Tensor:
        """The drafter's sampling distribution, [.., V]: what drafted tokens are drawn from."""
        return self.drafter(self.sampled)

    @property
    def p(self) -> Tensor:
        """The verifier's sampling distribution, [.., V]."""
        return self.verifier(self.sampled)

    @cached_property
    def support(self) -> Tensor:
        """Tokens that may be emitted: processed verifier logit above -inf, bool [.., V]."""
        return self.verifier(self.processed) > -torch.inf

    def allows(self, token: Tensor) -> Tensor:
        """`support` at one token: True where the tokens [..] may be emitted, bool [..]."""
        return gather_token(self.verifier(self.processed), token) > -torch.inf

    # Each model by name, for who asks of one alone

    @property
    def drafter_logits(self) -> Tensor:
        """The drafter's decision logits, [.., V]."""
        return self.drafter(self.decision)

    @property
    def verifier_logits(self) -> Tensor:
        """The verifier's decision logits, [.., V]."""
        return self.verifier(self.decision)

    @property
    def verifier_sampling_logits(self) -> Tensor | None:
        """The verifier's sampling logits, [.., V], where any are given."""
        return None if self.sampling is None else self.verifier(self.sampling)

    @property
    def drafter_logprobs(self) -> Tensor:
        """log q of the decision distribution, [.., V]."""
        return self.drafter(self.logprobs)

    @property
    def verifier_logprobs(self) -> Tensor:
        """log p of the decision distribution, [.., V]."""
        return self.verifier(self.logprobs)


def nats(value: Tensor) -> Tensor:
    """A divergence from `Distributions.mean_depth`: infinite where it has a masked token's stand-in, [..]."""
    return value.masked_fill(value > MOST_NATS, torch.inf)


def _check_shapes(logits: dict[str, Tensor]) -> None:
    verifier = logits["verifier_logits"]
    for name, other in logits.items():
        if other.shape[-1] != verifier.shape[-1]:
            raise InputError(
                f"vocabularies differ: {name} has {other.shape[-1]}, verifier_logits {verifier.shape[-1]}; "
                "cut or pad both to the tokenizer's size"
            )
        if other.shape != verifier.shape:
            raise InputError(
                f"{name} has shape {list(other.shape)}, verifier_logits {list(verifier.shape)}; they must agree"
            )
