"""Rules as `--rules` and `score_rules(rules=...)` take them (names, specs, rules), each swept over its dial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deferral_train.errors import InputError
from deferral_train.rules.base import Rule

POINTS = 40


@dataclass(frozen=True)
class Family:
    """One rule over the values of its dial.

    Attributes:
        name: how it is called in tables: the spec as typed, or the rule's name.
        rule: at any value of the dial.
        values: dial values in increasing order; ``(None,)`` for a rule without a dial.
        chosen: the value that was spelled out by the caller, which is always among ``values``; None where
            swept only.
    """

    name: str
    rule: Rule
    values: tuple[float | None, ...]
    chosen: float | None = None

    @property
    def settings(self) -> list[Rule]:
        """The rule at each value."""
        return [self.rule if value is None else self.rule.with_dial(value) for value in self.values]

    @property
    def parameter(self) -> str | None:
        """Name of the dial's parameter."""
        return None if self.rule.dial is None else self.rule.dial.parameter


def make_families(
    rules: Iterable[Rule | str] | Mapping[str, Rule | str],
    grid: int | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
) -> list[Family]:
    """Resolve rules and their grids.

    Args:
        rules: rule names or specs (``"opt"``, ``"learned:head=FOLDER"``), Rule instances, or a mapping from
            the name to be shown to one of these.
        grid: number of dial points (default 40), or the values themselves, or values by family name.

    Raises:
        InputError: no rules, an unknown one, two families under one name, a grid for a rule that is not
            there.
    """
    named = list(rules.items()) if isinstance(rules, Mapping) else [(None, rule) for rule in _listed(rules)]
    if not named:
        raise InputError("rules is empty; name at least one, for example rules=['opt', 'token_v3']")
    families = [_family(label, entry, grid) for label, entry in named]
    names = [family.name for family in families]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"rules named twice: {', '.join(twice)}; pass a mapping with a name of its own for each"
        )
    if isinstance(grid, Mapping) and (unknown := sorted(set(grid) - set(names))):
        raise InputError(f"grid names {', '.join(unknown)}, which is not among the rules: {', '.join(names)}")
    return families


def _listed(rules: Iterable[Rule | str]) -> list[Rule | str]:
    return [rules] if isinstance(rules, str | Rule) else list(rules)


def _family(
    label: str | None, entry: Rule | str, grid: int | Sequence[float] | Mapping[str, Sequence[float]] | None
) -> Family:
    rule, explicit = (_parse(entry)) if isinstance(entry, str) else (entry, True)
    if not isinstance(rule, Rule):
        raise InputError(f"rules: {rule!r} is neither a rule nor a rule's name; see `deferral-train rules`")
    name = label or (_without_dial(entry, rule) if isinstance(entry, str) else rule.name)
    if rule.dial is None:
        return Family(name, rule, (None,))
    chosen = rule.dial_value if explicit else None
    values = set(_values(rule, name, grid)) | ({chosen} if chosen is not None else set())
    return Family(name, rule, tuple(sorted(float(value) for value in values)), chosen)


def _parse(spec: str) -> tuple[Rule, bool]:
    """The rule of a spec, and whether a dial value is spelled out: in the spec, or as a head's own chosen
    alpha.
    """
    from deferral_train.heads.rules import rule_from_spec

    if spec.startswith("learned:") and "alpha=" not in spec:
        rule = rule_from_spec(f"{spec},alpha=0.0", typed=[spec])
        own = rule.head.metadata.get("alpha")  # type: ignore[attr-defined]
        return (rule, False) if own is None else (rule.with_dial(float(own)), True)
    rule = rule_from_spec(spec, typed=[spec])
    return rule, rule.dial is not None and f"{rule.dial.parameter}=" in spec


def _without_dial(spec: str, rule: Rule) -> str:
    """ "opt:alpha=0.2" is the family "opt"; "learned:head=runs/x,alpha=0.1" is "learned:head=runs/x"."""
    name, _, parameters = spec.partition(":")
    if rule.dial is None or f"{rule.dial.parameter}=" not in parameters:
        return spec
    kept = [part for part in parameters.split(",") if not part.strip().startswith(f"{rule.dial.parameter}=")]
    return f"{name}:{','.join(kept)}" if kept else name


def _values(
    rule: Rule, name: str, grid: int | Sequence[float] | Mapping[str, Sequence[float]] | None
) -> Sequence[float]:
    assert rule.dial is not None
    if isinstance(grid, Mapping):
        grid = grid.get(name)
    if grid is None or isinstance(grid, int):
        return [float(value) for value in rule.dial.swept(POINTS if grid is None else grid)]
    return grid
