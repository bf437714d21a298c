"""Features of a head: names from the summary vocabulary, with a transform named after a colon.

``drafter_max:logit`` is the log-odds of the drafter's largest probability. What a head reads online is what a
trace row stores, by the same name. F features, C raw columns (one per distinct name; D per hidden state).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.heads import lookups, memory
from deferral_train.provenance import hash_of
from deferral_train.rules.summary import FIELDS, HIDDEN_FIELDS, Summary

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 had no features that look tokens up, and no margins
STAGES = ("draft", "verify")
MAX_COLUMNS = 65_536

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "log": lambda x: x.clamp_min(1e-10).log(),
    "log1p": lambda x: x.clamp_min(0).log1p(),
    "logit": lambda x: torch.logit(x, eps=1e-6),
    "sqrt": lambda x: x.clamp_min(0).sqrt(),
    "square": lambda x: x * x,
}


@dataclass(frozen=True)
class Derived:
    """A feature computed from several summary fields; ``sees`` follows from what it reads."""

    fields: tuple[str, ...]
    compute: Callable[[Summary], Tensor]
    meaning: str


DERIVED: dict[str, Derived] = {
    "argmaxes_differ": Derived(
        ("drafter_argmax", "verifier_argmax"),
        lambda s: s["drafter_argmax"] != s["verifier_argmax"],
        "1 where the two models' most probable tokens differ (the zero-one gap is 0 elsewhere)",
    ),
    "token_is_argmax": Derived(
        ("token", "drafter_argmax"),
        lambda s: s["token"] == s["drafter_argmax"],
        "1 where the drafted token is the drafter's most probable one",
    ),
}


@dataclass(frozen=True)
class Feature:
    """One feature: a raw name (summary field or derived) and a transform."""

    name: str
    transform: str = "identity"

    @classmethod
    def parse(cls, text: str) -> Feature:
        """``"name"`` or ``"name:transform"``; an unknown one is refused by name."""
        name, _, transform = str(text).partition(":")
        transform = transform or "identity"
        known = {**FIELDS, **DERIVED, **memory.ORDERS, **lookups.FIELDS_READ}
        if name not in known:
            raise InputError(f"feature {name!r} is no summary field; known: {', '.join(sorted(known))}")
        if transform not in TRANSFORMS:
            raise InputError(
                f"transform {transform!r} of feature {name!r} is unknown; known: {', '.join(TRANSFORMS)}"
            )
        return cls(name, transform)

    def __str__(self) -> str:
        return self.name if self.transform == "identity" else f"{self.name}:{self.transform}"


def fields_of(name: str) -> tuple[str, ...]:
    """Summary fields that a raw feature name reads."""
    if name in memory.ORDERS:
        return memory.FIELDS_READ[name]
    if name in lookups.FIELDS_READ:
        return lookups.FIELDS_READ[name]
    return DERIVED[name].fields if name in DERIVED else (name,)


def check_stage(names: Sequence[str], stage: str) -> None:
    """Refuse a stage that does not exist, and at the draft stage every feature that needs the verifier."""
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} is unknown; choose one of: {', '.join(STAGES)}")
    if stage == "verify":
        return
    blind = [n for n in names if any(FIELDS[f].sees in ("verifier", "both") for f in fields_of(n))]
    if blind:
        raise InputError(
            f"a draft-stage head cannot read {', '.join(blind)}: only the verifier's pass gives it; "
            "use stage='verify' or drafter features"
        )


class FeatureSet(nn.Module):
    """Turns a summary into raw columns and raw columns into transformed features.

    Args:
        features: names with optional transforms, in any order; duplicates are refused.
        stage: ``"draft"`` refuses what needs the verifier.
        widths: D of each hidden-state field used, e.g. ``{"drafter_hidden": 64}``; ``vocabulary`` and ``matrix`` where
            a feature looks tokens up (:mod:`deferral_train.heads.lookups`).
        extra: raw names to carry as columns although the body does not read them (a gate, tv).
        memory_entries: size of the memory behind ``memory_k``, see :mod:`deferral_train.heads.memory`.
    """

    memory: memory.Memory | None
    lookups: lookups.Lookups | None
    order: Tensor

    def __init__(
        self,
        features: Sequence[str],
        stage: str = "verify",
        widths: Mapping[str, int] | None = None,
        extra: Sequence[str] = (),
        memory_entries: int = 0,
    ) -> None:
        super().__init__()
        self.features = tuple(Feature.parse(f) for f in features)
        self.stage = stage
        self.widths = {name: int(width) for name, width in (widths or {}).items()}
        if len(set(self.features)) != len(self.features):
            raise InputError(f"features repeat: {', '.join(map(str, self.features))}; name each once")
        self.names = tuple(dict.fromkeys([*(f.name for f in self.features), *extra]))
        check_stage(self.names, stage)
        self.orders = [memory.ORDERS[name] for name in self.names if name in memory.ORDERS]
        self.memory = memory.Memory(memory_entries) if self.orders else None
        looked_up = [name for name in self.names if name in lookups.FIELDS_READ]
        self.lookups = lookups.Lookups(looked_up, self.widths) if looked_up else None
        self._lay_out()

    def width_of(self, name: str) -> int:
        """Columns of a raw feature."""
        if name in memory.ORDERS:
            return memory.WIDTH
        if self.lookups is not None and name in lookups.FIELDS_READ:
            return self.lookups.feature_width(name)
        if name not in HIDDEN_FIELDS:
            return 1
        if self.widths.get(name, 0) < 1:
            raise InputError(f"feature {name!r} is a vector; give its width, e.g. widths={{{name!r}: 64}}")
        return self.widths[name]

    def _lay_out(self) -> None:
        """Assign raw columns, and order the features by transform, so that one call serves all of a transform."""
        self.start: dict[str, int] = {}
        width = 0
        for name in self.names:
            self.start[name] = width
            width += self.width_of(name)
        if width > MAX_COLUMNS:
            raise InputError(f"{width} feature columns; at most {MAX_COLUMNS} are allowed")
        self.width = width
        self.groups: list[tuple[str, int]] = []  # transform, number of its columns
        order: list[int] = []
        for transform in dict.fromkeys(f.transform for f in self.features):
            columns = [c for f in self.features if f.transform == transform for c in self._columns_of(f.name)]
            self.groups.append((transform, len(columns)))
            order += columns
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.out_features = sum(self.width_of(f.name) for f in self.features)

    @property
    def spans(self) -> dict[str, slice]:
        """Where each feature, by its text, lies among the columns that :meth:`forward` gives."""
        found, at = {}, 0
        for transform, _ in self.groups:
            for feature in self.features:
                if feature.transform == transform:
                    found[str(feature)] = slice(at, at + self.width_of(feature.name))
                    at += self.width_of(feature.name)
        return found

    def _columns_of(self, name: str) -> range:
        return range(self.start[name], self.start[name] + self.width_of(name))

    @property
    def needs(self) -> tuple[str, ...]:
        """Summary fields that must be present, each once."""
        return tuple(dict.fromkeys(f for name in self.names for f in fields_of(name)))

    @property
    def schema(self) -> dict[str, Any]:
        """Features as config.json records them: version, stage, and rows of name, transform, width in order."""
        rows = [[f.name, f.transform, self.width_of(f.name)] for f in self.features]
        return {"version": SCHEMA_VERSION, "stage": self.stage, "features": rows}

    def schema_of(self, version: int) -> dict[str, Any]:
        """:attr:`schema` as an earlier version of this package recorded it."""
        return {**self.schema, "version": version}

    @property
    def schema_hash(self) -> str:
        """Hash over :attr:`schema`."""
        return hash_of(self.schema)

    def columns(self, summary: Summary, leave_out: Tensor | None = None) -> Tensor:
        """Raw columns ``[.., C]`` in float32 of a summary with leading shape ``[..]``.

        ``leave_out`` holds the gold tokens of rows that the memory was fitted on, see :meth:`Memory.columns`.
        """
        columns = [self._raw(summary, name, leave_out) for name in self.names]
        return torch.cat(columns, dim=-1).float()  # integers and booleans join the float32 columns here

    def _raw(self, summary: Summary, name: str, leave_out: Tensor | None) -> Tensor:
        if self.memory is not None and name in memory.ORDERS:
            return self.memory.columns(summary, memory.ORDERS[name], leave_out)
        if self.lookups is not None and name in lookups.FIELDS_READ:
            return self.lookups.columns(summary, name)
        value = DERIVED[name].compute(summary) if name in DERIVED else summary[name]
        # Half precision would round the integers that join it.
        value = value.float() if value.is_floating_point() else value
        if name not in HIDDEN_FIELDS:
            return value.unsqueeze(-1)
        if value.shape[-1] != self.widths[name]:
            raise InputError(
                f"{name} has width {value.shape[-1]} here, the head was made for {self.widths[name]}; "
                "use the pair it was trained on"
            )
        return value

    def column(self, x: Tensor, name: str) -> Tensor:
        """The single raw column ``name`` of ``x [.., C]``, shape ``[..]``."""
        return x[..., self.start[name]]

    def forward(self, x: Tensor) -> Tensor:
        """Transformed features ``[N, F]`` of raw columns ``x [N, C]``."""
        ordered = x.index_select(-1, self.order).split([width for _, width in self.groups], dim=-1)
        parts = [TRANSFORMS[name](part) for (name, _), part in zip(self.groups, ordered)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
