"""The four laws at a position, made once from logits: two that decide, two that are sampled from.

Knows nothing about rules. Shapes: leading shape free, last axis V (vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.reduce import Reduced, reduce_rows

try:
    import numpy as np
except ImportError:  # a served head runs where torch alone is installed
    np = None  # type: ignore[assignment]


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


def check_normaliser(normaliser: Tensor, what: str) -> None:
    """Refuse logits whose log normaliser is not finite: NaN, +inf, or a row that is masked throughout.

    The normaliser is needed anyway, so that the check costs no pass over the vocabulary.
    """
    if not math.isfinite(float(normaliser.detach().sum())):
        raise InputError(
            f"{what} has NaN, +inf or only -inf in {int((~torch.isfinite(normaliser)).sum())} position(s); "
            "logits must be finite, with -inf only for masked tokens"
        )


def lowest_argmax(values: Tensor) -> Tensor:
    """The lowest index of the largest entry of the last axis, int64 [..]; a NaN counts as largest.

    NumPy finds it ten times faster than torch does on a CPU. Ties go to the lowest index in both.
    """
    if np is not None and values.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.asarray(values.detach().numpy().argmax(axis=-1)))
    return values.max(dim=-1).indices


def places(mask: Tensor) -> Tensor:
    """Indices of the true entries of ``mask`` [V] on a CPU, int64; NumPy finds them several times faster."""
    return mask.nonzero().squeeze(-1) if np is None else torch.from_numpy(np.flatnonzero(mask.numpy()))


def gather_token(values: Tensor, token: Tensor) -> Tensor:
    """Each position's value at its token: [.., V] and ids [..] to [..]."""
    return values.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Point masses [.., size] at `index` [..]."""
    law = torch.zeros(*index.shape, size, dtype=dtype, device=index.device)
    return law.scatter_(-1, index.unsqueeze(-1), 1.0)


class DecisionLaw:
    """One model's decision law in a few numbers per position, each computed once and only if it is read.

    Args:
        logits: [.., V].
        law: gives softmax(logits), and refuses logits that are not finite.
    """

    def __init__(self, logits: Tensor, law: Callable[[], Tensor]) -> None:
        self.logits, self.law = logits, law
        self._argmax: Tensor | None = None
        self._known: Reduced | None = None
        self._largest: Tensor | None = None

    @property
    def argmax(self) -> Tensor:
        """The lowest argmax, [..]."""
        if self._argmax is None:
            self._argmax = lowest_argmax(self.logits)
        return self._argmax

    @property
    def logsumexp(self) -> Tensor:
        """log sum exp of the logits, [..]."""
        return self._reduced(False).logsumexp

    @property
    def entropy(self) -> Tensor:
        """[..], nats."""
        entropy = self._reduced(True).entropy
        assert entropy is not None
        return entropy

    @property
    def largest(self) -> Tensor:
        """The largest probability, [..]; the same bits as exp(logprob) at that token, so that ties tie."""
        if self._largest is None:
            known = self._reduced(False)
            self._largest = (known.top - known.logsumexp).clamp(max=0.0).exp()
        return self._largest

    def logprob(self, token: Tensor) -> Tensor:
        """log probabilities of tokens [..], without the law; never above 0."""
        return (gather_token(self.logits, token) - self.logsumexp).clamp(max=0.0)

    def _reduced(self, entropy: bool) -> Reduced:
        if self._known is None or (entropy and self._known.entropy is None):
            self._known = reduce_rows(self.logits, self.law(), entropy)
        return self._known


@dataclass(frozen=True)
class Laws:
    """Decision and sampling laws of a drafter and a verifier over the same positions.

    Decision laws are softmax of the decision logits (after logits processors, before temperature and
    truncation). Sampling laws are softmax(decision logits / temperature), or softmax of the sampling logits
    where these are given (already after temperature and truncation, -inf = never). At temperature 0 they are
    the one-hot of the lowest argmax.
    """

    drafter_logits: Tensor
    verifier_logits: Tensor
    temperature: float = 1.0
    drafter_sampling_logits: Tensor | None = None
    verifier_sampling_logits: Tensor | None = None

    @classmethod
    def of(
        cls,
        drafter_logits: Tensor,
        verifier_logits: Tensor,
        temperature: float = 1.0,
        drafter_sampling_logits: Tensor | None = None,
        verifier_sampling_logits: Tensor | None = None,
    ) -> Laws:
        """Check types and shapes, and promote both models to one precision.

        Raises:
            InputError: a shape, a vocabulary or a type that does not fit.
        """
        drafter = as_float(drafter_logits, "drafter_logits")
        verifier = as_float(verifier_logits, "verifier_logits")
        dtype = torch.promote_types(drafter.dtype, verifier.dtype)
        tensors = [drafter.to(dtype), verifier.to(dtype)]
        for what, logits in (
            ("drafter_sampling_logits", drafter_sampling_logits),
            ("verifier_sampling_logits", verifier_sampling_logits),
        ):
            tensors.append(None if logits is None else as_float(logits, what).to(dtype))  # type: ignore[arg-type]
        _check_shapes(tensors)
        return cls(tensors[0], tensors[1], check_temperature(temperature), tensors[2], tensors[3])

    @property
    def greedy(self) -> bool:
        """Whether the sampling laws are one-hots."""
        return self.temperature == 0.0

    @cached_property
    def drafter_probs(self) -> Tensor:
        """q of the decision law, [.., V]."""
        if self.temperature == 1.0 and self.drafter_sampling_logits is None:
            return self.q
        return _softmax(self.drafter_logits, "drafter_logits")

    @cached_property
    def verifier_probs(self) -> Tensor:
        """p of the decision law, [.., V]."""
        if self.temperature == 1.0 and self.verifier_sampling_logits is None:
            return self.p
        return _softmax(self.verifier_logits, "verifier_logits")

    @cached_property
    def drafter_side(self) -> DecisionLaw:
        """The drafter's decision law in a few numbers per position."""
        return DecisionLaw(self.drafter_logits, lambda: self.drafter_probs)

    @cached_property
    def verifier_side(self) -> DecisionLaw:
        """The verifier's."""
        return DecisionLaw(self.verifier_logits, lambda: self.verifier_probs)

    @property
    def drafter_logsumexp(self) -> Tensor:
        """log sum exp of the drafter's decision logits, [..]."""
        return self.drafter_side.logsumexp

    @property
    def verifier_logsumexp(self) -> Tensor:
        """log sum exp of the verifier's decision logits, [..]."""
        return self.verifier_side.logsumexp

    @cached_property
    def drafter_logprobs(self) -> Tensor:
        """log q of the decision law, [.., V]; never above 0, so that no probability exceeds 1 by rounding."""
        return (self.drafter_logits - self.drafter_logsumexp.unsqueeze(-1)).clamp_(max=0.0)

    @cached_property
    def verifier_logprobs(self) -> Tensor:
        """log p of the decision law, [.., V]; never above 0."""
        return (self.verifier_logits - self.verifier_logsumexp.unsqueeze(-1)).clamp_(max=0.0)

    @cached_property
    def sampled_argmaxes_differ(self) -> Tensor:
        """Whether the greedy tokens of the processed logits differ, bool [..]."""
        drafter, verifier = self.drafter_side.argmax, self.verifier_side.argmax
        if self.drafter_sampling_logits is not None:
            drafter = lowest_argmax(self.drafter_sampling_logits)
        if self.verifier_sampling_logits is not None:
            verifier = lowest_argmax(self.verifier_sampling_logits)
        return drafter != verifier

    @cached_property
    def q(self) -> Tensor:
        """The drafter's sampling law, [.., V]: what drafted tokens are drawn from."""
        return self._sampling_law(self.drafter_logits, self.drafter_sampling_logits, "drafter")

    @cached_property
    def p(self) -> Tensor:
        """The verifier's sampling law, [.., V]."""
        return self._sampling_law(self.verifier_logits, self.verifier_sampling_logits, "verifier")

    @property
    def processed_verifier_logits(self) -> Tensor:
        """The verifier's logits after processing; -inf marks tokens that are never emitted."""
        given = self.verifier_sampling_logits
        return self.verifier_logits if given is None else given

    @property
    def processed_drafter_logits(self) -> Tensor:
        """The drafter's logits after processing."""
        given = self.drafter_sampling_logits
        return self.drafter_logits if given is None else given

    @cached_property
    def support(self) -> Tensor:
        """Tokens that may be emitted: processed verifier logit above -inf, bool [.., V]."""
        return self.processed_verifier_logits > -torch.inf

    def at(self, index: tuple[Tensor, ...]) -> Laws:
        """The laws at some positions (advanced indexing of the leading shape)."""

        def pick(logits: Tensor | None) -> Tensor | None:
            return None if logits is None else logits[index]

        return Laws(
            self.drafter_logits[index],
            self.verifier_logits[index],
            self.temperature,
            pick(self.drafter_sampling_logits),
            pick(self.verifier_sampling_logits),
        )

    def row(self, n: int) -> Laws:
        """Position ``n`` of laws [R, V] as laws [1, V]; what is known of the sampling laws is not computed again."""

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[n : n + 1]

        logits = self.drafter_logits[n : n + 1], self.verifier_logits[n : n + 1]
        given = pick(self.drafter_sampling_logits), pick(self.verifier_sampling_logits)
        found = Laws(*logits, self.temperature, *given)
        for name in ("q", "p"):
            if name in self.__dict__:
                found.__dict__[name] = self.__dict__[name][n : n + 1]  # where cached_property looks
        return found

    def _sampling_law(self, decision: Tensor, given: Tensor | None, who: str) -> Tensor:
        processed = decision if given is None else given
        what = f"{who}_logits" if given is None else f"{who}_sampling_logits"
        if self.greedy:
            index = lowest_argmax(processed)
            check_normaliser(gather_token(processed, index), what)
            return one_hot(index, processed.shape[-1], processed.dtype)
        scaled = given is None and self.temperature != 1.0
        return _softmax(processed / self.temperature if scaled else processed, what)


def _softmax(logits: Tensor, what: str) -> Tensor:
    law = torch.softmax(logits, dim=-1)
    # One NaN or +inf, or nothing but -inf, turns the whole row to NaN: its first entry tells.
    check_normaliser(law[..., 0], what)
    return law


def _check_shapes(tensors: list[Tensor]) -> None:
    drafter, verifier = tensors[0], tensors[1]
    if drafter.shape[-1] != verifier.shape[-1]:
        raise InputError(
            f"vocabularies differ: drafter {drafter.shape[-1]}, verifier {verifier.shape[-1]}; "
            "cut or pad both to the tokenizer's size"
        )
    names = ("drafter_logits", "verifier_logits", "drafter_sampling_logits", "verifier_sampling_logits")
    for name, logits in zip(names, tensors):
        if logits is not None and logits.shape != verifier.shape:
            raise InputError(
                f"{name} has shape {list(logits.shape)}, verifier_logits {list(verifier.shape)}; "
                "they must agree"
            )
