"""Labels of ``decode`` outputs read as settings of a dial, and the order in which a dial is tried."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deferral_train.rules.registry import RULES

_LABEL = re.compile(r"^(?P<family>.+?)[:,](?P<parameter>\w+)=(?P<value>[+-]?[\d.]+(?:[eE][+-]?\d+)?)$")
# Label -> {"rule", "parameter", "value"} of a decoded rule, None where it has no dial.
Dials = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Setting:
    """One decoded setting.

    Attributes:
        label: its name in the outputs.
        family: settings of one family differ in the dial alone.
        rule: the rule's own name.
        parameter, value: of its dial.
    """

    label: str
    family: str
    rule: str
    parameter: str
    value: float


def parse_label(label: str) -> Setting | None:
    """``opt:alpha=0.2`` as a setting; None where the label says no dial."""
    found = _LABEL.match(label)
    if found is None:
        return None
    family = found["family"]
    return Setting(label, family, family.split(":")[0], found["parameter"], float(found["value"]))


def setting_of(label: str, dials: Dials | None = None) -> Setting | None:
    """The setting behind a label: what the summary recorded, else what the label says; None without a
    dial.
    """
    parsed = parse_label(label)
    recorded = (dials or {}).get(label)
    if recorded is None:
        return parsed
    family = label if parsed is None else parsed.family
    return Setting(label, family, recorded["rule"], recorded["parameter"], float(recorded["value"]))


def dials_of(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """Dials by label, as ``summary.json`` of a decode run recorded them."""
    return {label: rule.get("dial") for label, rule in summary["rules"].items()}


def in_order(settings: Sequence[Setting]) -> list[Setting]:
    """One family from the lossless end of its dial to the drafter's; for heads and OPT a larger alpha keeps
    more.
    """
    dial = RULES[settings[0].rule].dial if settings and settings[0].rule in RULES else None
    falling = dial is not None and (
        (dial.lossless is not None and dial.lossless == dial.high)
        or (dial.lossless is None and dial.drafter is not None and dial.drafter == dial.low)
    )
    return sorted(settings, key=lambda setting: setting.value, reverse=falling)
