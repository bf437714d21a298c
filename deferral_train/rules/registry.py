"""Rules by name. A user's own class is imported only when the caller says so."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from deferral_train.errors import InputError
from deferral_train.rules.base import Rule
from deferral_train.rules.baselines import Biased, Cactus, Ensemble, Lenient, Lossy, Mentored
from deferral_train.rules.learned import Judge, LearnedRule
from deferral_train.rules.position import (
    BiLD,
    Chow,
    ChowLog,
    Diff,
    DiffLog,
    DrafterOnly,
    Fuzzy,
    Lossless,
    Opt,
    OptLog,
    OptVerifier,
    VerifierOnly,
)
from deferral_train.rules.token import LogitMargin, TokenV1, TokenV2, TokenV3, Typical

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(Lossless, DrafterOnly, VerifierOnly, Lossy, Lenient, BiLD, Chow, ChowLog, Diff, DiffLog),
        *(Opt, OptLog, OptVerifier, TokenV1, TokenV2, TokenV3, Ensemble, Typical, Mentored, Fuzzy, Cactus),
        *(LogitMargin, Biased, Judge, LearnedRule),
    )
}


def make_rule(name: str, /, *, allow_import: bool = False, **parameters: Any) -> Rule:
    """A rule by name, for example ``make_rule("opt", alpha=0.2)``.

    Args:
        name: one of `RULES`, or ``"package.module:Class"`` of a user's own rule with allow_import=True.
        allow_import: import a user's class. Only for names that the user typed; never for names that were
            read from an artifact.
        parameters: the rule's parameters.

    Raises:
        InputError: an unknown name or parameter, a value out of range, a class that is no Rule.
    """
    rule = _imported(name, allow_import) if ":" in name else RULES.get(name)
    if rule is None:
        raise InputError(f"unknown rule {name!r}; known: {', '.join(RULES)}")
    known = [field.name for field in fields(rule)]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        listing = ", ".join(known) or "none"
        raise InputError(f"rule {rule.name} has no parameter {', '.join(unknown)}; its parameters: {listing}")
    return rule(**parameters)


def _imported(name: str, allowed: bool) -> type[Rule]:
    if not allowed:
        raise InputError(
            f"rule {name!r} would import code, and names from files never do; type it yourself, in Python with "
            "allow_import=True"
        )
    module_name, _, class_name = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"rule {name!r} cannot be imported: {error}") from error
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise InputError(f"rule {name!r} is {rule!r}; it must be a subclass of deferral_train.rules.Rule")
    return rule


def short_label(label: str, width: int) -> str:
    """A rule's label in at most ``width`` characters: both ends stay, since names differ in front and dials behind."""
    if len(label) <= width:
        return label
    front = (width - 2) // 2
    return f"{label[:front]}..{label[len(label) - (width - 2 - front) :]}"
