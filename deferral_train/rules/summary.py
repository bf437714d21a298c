"""The summary: one vocabulary of per-position quantities of (q, p) for rules, heads and traces.

Knows nothing about rules. What a rule asks for online is what a trace row stores and what a head's feature is
called. Entropies and divergences are in nats; argmax ties go to the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.distributions import Distributions


@dataclass(frozen=True)
class Field:
    """One quantity of the summary.

    Attributes:
        name: what rules, traces and head features call it.
        meaning: one phrase, with its unit.
        dtype: ``"float"`` or ``"int"``.
        sees: who must have scored the position: ``"drafter"``, ``"verifier"``, ``"both"``, or ``"context"``.
    """

    name: str
    meaning: str
    dtype: str
    sees: str


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        # about the position, from the decision distributions
        Field("drafter_max", "max q", "float", "drafter"),
        Field("verifier_max", "max p", "float", "verifier"),
        Field("drafter_margin", "largest less second largest logit of the drafter", "float", "drafter"),
        Field("verifier_margin", "largest less second largest logit of the verifier", "float", "verifier"),
        Field("drafter_argmax", "v_q, the lowest argmax of q", "int", "drafter"),
        Field("verifier_argmax", "v_p, the lowest argmax of p", "int", "verifier"),
        Field("drafter_at_verifier_argmax", "q(v_p)", "float", "both"),
        Field("verifier_at_drafter_argmax", "p(v_q)", "float", "both"),
        Field("drafter_entropy", "H(q), nats", "float", "drafter"),
        Field("verifier_entropy", "H(p), nats", "float", "verifier"),
        Field("kl", "KL(p||q), nats", "float", "both"),
        Field("reverse_kl", "KL(q||p), nats", "float", "both"),
        Field("js", "Jensen-Shannon divergence, nats (at most log 2)", "float", "both"),
        Field("cross_entropy", "-sum p log q, nats", "float", "both"),
        Field("drafter_sum_squares", "sum q^2", "float", "drafter"),
        Field("verifier_sum_squares", "sum p^2", "float", "verifier"),
        Field("product_sum", "sum p q", "float", "both"),
        Field("drafter_logsumexp", "log normaliser of the drafter's logits", "float", "drafter"),
        Field("verifier_logsumexp", "log normaliser of the verifier's logits", "float", "verifier"),
        Field("tv_unscaled", "D_TV(p, q) of the decision distributions", "float", "both"),
        # from the sampling distributions
        Field("tv", "D_TV of the sampling distributions (temperature 0: argmaxes differ)", "float", "both"),
        # about one token x
        Field("token", "x, the token spoken of (usually the drafted one)", "int", "drafter"),
        Field("drafter_logprob", "log q(x)", "float", "drafter"),
        Field("verifier_logprob", "log p(x)", "float", "verifier"),
        # context, given by the caller
        Field("drafter_hidden", "the drafter's last hidden state [.., D]", "float", "drafter"),
        Field("verifier_hidden", "the verifier's last hidden state [.., D]", "float", "verifier"),
        Field(
            "verifier_hidden_at_token",
            "the verifier's last hidden state once it has read x, at x's own position [.., D]",
            "float",
            "verifier",
        ),
        Field("draft_position", "0-based place in the drafted block", "int", "context"),
        Field("position", "tokens generated before this one", "int", "context"),
        Field(
            "previous_token_1",
            "the token generated before this one; -1 where there is none",
            "int",
            "context",
        ),
        Field(
            "previous_token_2",
            "the token generated two places before; -1 where there is none",
            "int",
            "context",
        ),
        Field(
            "previous_token_3",
            "the token generated three places before; -1 where there is none",
            "int",
            "context",
        ),
    )
}

PREVIOUS_TOKENS = ("previous_token_1", "previous_token_2", "previous_token_3")  # nearest first

HIDDEN_FIELDS = frozenset({"drafter_hidden", "verifier_hidden", "verifier_hidden_at_token"})
TOKEN_FIELDS = frozenset({"token", "drafter_logprob", "verifier_logprob"})
CONTEXT_FIELDS = HIDDEN_FIELDS | {"draft_position", "position", *PREVIOUS_TOKENS}
COMPUTED_FIELDS = frozenset(FIELDS) - CONTEXT_FIELDS
# What an external draft without a distribution cannot give: with a one-hot q these say nothing about the drafter.
DRAFTER_CONFIDENCE_FIELDS = frozenset(
    {"drafter_max", "drafter_margin", "drafter_at_verifier_argmax", "drafter_entropy", "drafter_sum_squares"}
    | {"kl", "reverse_kl", "js", "cross_entropy", "product_sum", "drafter_logsumexp", "drafter_logprob"}
)


class Summary(Mapping[str, Tensor]):
    """A frozen mapping from field name to tensor with a shared leading shape.

    ``summary.drafter_max`` and ``summary["drafter_max"]`` are the same. A field that is not there raises
    InputError naming it.
    """

    _columns: dict[str, Tensor]

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        unknown = sorted(set(columns) - set(FIELDS))
        if unknown:
            raise InputError(f"unknown summary field(s) {', '.join(unknown)}; known: {', '.join(FIELDS)}")
        object.__setattr__(self, "_columns", dict(columns))
        shapes = {name: self._leading(name) for name in columns}
        if len(set(shapes.values())) > 1:
            listing = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InputError(f"summary fields must share their leading shape; got {listing}")

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor]) -> Summary:
        """A summary of tensors (or arrays) already computed, for example the columns of a trace."""
        return cls({name: torch.as_tensor(column) for name, column in columns.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are present."""
        return tuple(self._columns)

    @property
    def shape(self) -> torch.Size:
        """The shared leading shape."""
        for name in self._columns:
            return self._leading(name)
        return torch.Size()

    def full(self, value: bool) -> Tensor:
        """One decision for every position, bool of the leading shape."""
        device = next(iter(self._columns.values())).device if self._columns else None
        return torch.full(self.shape, value, dtype=torch.bool, device=device)

    def select(self, mask: Tensor) -> Summary:
        """The summary at some positions: a boolean mask or an index over the leading shape."""
        return Summary({name: column[mask] for name, column in self._columns.items()})

    def with_fields(self, columns: Mapping[str, Tensor]) -> Summary:
        """A summary with further fields, or with some replaced."""
        return Summary({**self._columns, **columns})

    def expand_candidates(self, tokens: Tensor) -> Summary:
        """The same positions seen with each candidate token: leading shape [..] becomes [.., K].

        Args:
            tokens: ids [.., K], stored as the field ``token``.
        """
        count = tokens.shape[-1]
        columns = {}
        for name, column in self._columns.items():
            if name not in TOKEN_FIELDS:
                axis = len(self._leading(name))
                columns[name] = column.unsqueeze(axis).expand(
                    *column.shape[:axis], count, *column.shape[axis:]
                )
        return Summary({**columns, "token": tokens})

    def _leading(self, name: str) -> torch.Size:
        shape = self._columns[name].shape
        return shape[:-1] if name in HIDDEN_FIELDS else shape

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._columns[name]
        except KeyError:
            raise InputError(
                f"the summary has no field {name!r}; it holds {', '.join(self._columns) or 'nothing'}"
            ) from None

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        """The field, or `default` where it is absent."""
        return self._columns.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getattr__(self, name: str) -> Tensor:
        if name in FIELDS:
            return self[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Summary is frozen; use with_fields")

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __reduce__(self) -> tuple:
        return (Summary, (self._columns,))

    def __repr__(self) -> str:
        return f"Summary(shape={list(self.shape)}, fields={', '.join(self._columns)})"


def summarize(
    drafter_logits: Tensor,
    verifier_logits: Tensor,
    *,
    temperature: float = 1.0,
    drafter_sampling_logits: Tensor | None = None,
    verifier_sampling_logits: Tensor | None = None,
    token: Tensor | None = None,
    fields: Iterable[str] | None = None,
) -> Summary:
    """The summary of two models' logits over the same positions.

    Args:
        drafter_logits, verifier_logits: decision logits [.., V].
        temperature: of the sampling distributions that `tv` compares; 0 is greedy.
        drafter_sampling_logits, verifier_sampling_logits: logits after temperature and truncation [.., V],
            where the sampling distribution is not softmax(decision logits / temperature).
        token: ids [..] for the fields about one token.
        fields: which to compute; None computes all that can be.

    Raises:
        InputError: an unknown field, shapes that differ, logits that are not finite (masked -inf is allowed).
    """
    distributions = Distributions.of(
        drafter_logits, verifier_logits, temperature, drafter_sampling_logits, verifier_sampling_logits
    )
    distributions.check()
    if fields is None:
        fields = COMPUTED_FIELDS if token is not None else COMPUTED_FIELDS - TOKEN_FIELDS
    return summarize_distributions(distributions, fields, token)


def summarize_distributions(
    distributions: Distributions, fields: Iterable[str], token: Tensor | None = None
) -> Summary:
    """As `summarize`, from distributions already made; unchecked, so that nothing is copied to the host."""
    columns: dict[str, Tensor] = {}
    for name in sorted(fields):
        if name in TOKEN_FIELDS:
            if token is None:
                raise InputError(f"summary field {name!r} needs token=")
            columns[name] = _TOKEN_FORMULAS[name](distributions, token)
        elif name in _FORMULAS:
            columns[name] = _FORMULAS[name](distributions)
        else:
            known = "is given by the caller" if name in FIELDS else "is unknown"
            computable = ", ".join(sorted(COMPUTED_FIELDS))
            raise InputError(f"summary field {name!r} {known}; computable: {computable}")
    return Summary(columns)


def total_variation(both: Tensor, distributions: Distributions) -> Tensor:
    """D_TV = sum_v max(0, p - q) of both distributions [.., V] each; at most 1 against rounding."""
    return (
        (distributions.verifier(both) - distributions.drafter(both)).clamp(min=0.0).sum(dim=-1).clamp(max=1.0)
    )


def _js(distributions: Distributions) -> Tensor:
    """H((p + q)/2) - (H(p) + H(q))/2."""
    drafter, verifier = (
        distributions.drafter(distributions.probs),
        distributions.verifier(distributions.probs),
    )
    total = (drafter + verifier).clamp_(min=torch.finfo(drafter.dtype).tiny)
    entropies = distributions.drafter(distributions.entropy) + distributions.verifier(distributions.entropy)
    both = torch.xlogy(total, total).sum(dim=-1) + entropies
    return torch.rsub(both, math.log(2), alpha=0.5).clamp(min=0.0)


def _sampled_tv(distributions: Distributions) -> Tensor:
    if distributions.greedy:
        return (distributions.drafter(distributions.best) != distributions.verifier(distributions.best)).to(
            distributions.decision.dtype
        )
    return total_variation(distributions.sampled, distributions)


_FORMULAS: dict[str, Callable[[Distributions], Tensor]] = {
    "drafter_max": lambda distributions: distributions.drafter(distributions.largest),
    "verifier_max": lambda distributions: distributions.verifier(distributions.largest),
    "drafter_margin": lambda distributions: distributions.drafter(distributions.margin),
    "verifier_margin": lambda distributions: distributions.verifier(distributions.margin),
    "drafter_argmax": lambda distributions: distributions.drafter(distributions.argmax),
    "verifier_argmax": lambda distributions: distributions.verifier(distributions.argmax),
    "drafter_at_verifier_argmax": lambda distributions: distributions.drafter(distributions.at_argmaxes)[
        ..., 1
    ],
    "verifier_at_drafter_argmax": lambda distributions: distributions.verifier(distributions.at_argmaxes)[
        ..., 0
    ],
    "drafter_entropy": lambda distributions: distributions.drafter(distributions.entropy),
    "verifier_entropy": lambda distributions: distributions.verifier(distributions.entropy),
    "kl": lambda distributions: distributions.verifier(distributions.divergence),
    "reverse_kl": lambda distributions: distributions.drafter(distributions.divergence),
    "js": _js,
    "cross_entropy": lambda distributions: distributions.cross_entropy,
    "drafter_sum_squares": lambda distributions: (
        distributions.drafter(distributions.probs).square().sum(dim=-1)
    ),
    "verifier_sum_squares": lambda distributions: (
        distributions.verifier(distributions.probs).square().sum(dim=-1)
    ),
    "product_sum": lambda distributions: (
        distributions.drafter(distributions.probs) * distributions.verifier(distributions.probs)
    ).sum(dim=-1),
    "drafter_logsumexp": lambda distributions: distributions.drafter(
        distributions.peak - distributions.largest_logprob
    ),
    "verifier_logsumexp": lambda distributions: distributions.verifier(
        distributions.peak - distributions.largest_logprob
    ),
    "tv_unscaled": lambda distributions: total_variation(distributions.probs, distributions),
    "tv": _sampled_tv,
}

_TOKEN_FORMULAS: dict[str, Callable[[Distributions, Tensor], Tensor]] = {
    "token": lambda distributions, token: token,
    "drafter_logprob": lambda distributions, token: distributions.logprobs_of(token)[0],
    "verifier_logprob": lambda distributions, token: distributions.logprobs_of(token)[1],
}
