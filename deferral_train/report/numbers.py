"""Numbers and their intervals as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def nice(value: float | None) -> str:
    """A number for reading: about three digits."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or isinstance(value, int):
        return str(int(value))
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}" if abs(value) < 1e6 else f"{value:.3g}"


def interval(number: Mapping[str, Any] | None, scale: float = 1.0, sign: bool = False) -> str:
    """``0.52 [0.50, 0.54]``; the brackets are left out where there is no interval."""
    if number is None or number.get("value") is None:
        return "–"
    text = signed(number["value"] * scale, sign)
    if number.get("low") is None:
        return text
    return f"{text} [{signed(number['low'] * scale, sign)}, {signed(number['high'] * scale, sign)}]"


def signed(value: float, sign: bool) -> str:
    """``0.52``, with a plus sign where ``sign`` asks for one."""
    return ("+" if sign and value > 0 else "") + nice(value).replace("-", "−")


def cell(number: Mapping[str, Any] | None, write: Callable[[float], str] = nice) -> dict[str, str]:
    """A table cell: ``value``, and ``range`` below it, empty where the number has no interval."""
    if number is None:
        return {"value": "–", "range": ""}
    between = "" if number["low"] is None else f"{write(number['low'])} to {write(number['high'])}"
    return {"value": write(number["value"]), "range": between}


def limits(low: float, high: float, scale: float, sign: bool) -> str:
    """``0.50 to 0.54``."""
    return f"{signed(low * scale, sign)} to {signed(high * scale, sign)}"
