"""Rules by name. A user's own class is imported only when the caller says so."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from deferral_train.errors import InputError
from deferral_train.rules import (  # noqa: F401 - their rules register themselves
    baselines,
    forgiving,
    learned,
    position,
    rejected_pairs,
    token,
)
from deferral_train.rules.base import RULES, Rule

__all__ = ["RULES", "make_rule", "short_label"]

# In the order in which people read of them; rules of other modules come last.
_ORDER = [
    f"deferral_train.rules.{one}"
    for one in ("position", "token", "rejected_pairs", "baselines", "forgiving", "learned")
]
_READ = sorted(RULES.items(), key=lambda pair: [*_ORDER, pair[1].__module__].index(pair[1].__module__))
RULES.clear()
RULES.update(_READ)


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
