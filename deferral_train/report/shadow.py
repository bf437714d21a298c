"""The section on shadow mode: what switching a rule on would bring, from files that a serving engine wrote.

A file holds, by rule, the number of requests and sums and sums of products over requests of `COLUMNS`. Every number
shown is a ratio a/b of such sums; its standard error is that of a ratio of means over independent requests,
sqrt(n / (n - 1) * sum (a - R b)^2) / sum b.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train.errors import InputError
from deferral_train.report.numbers import cell

FILES = ("shadow.json", "shadow-*.json", "shadow/*.json")  # of a run folder
SCHEMA_VERSION = 1
COLUMNS = ("blocks", "served", "shadow", "loss")
MIN_REQUESTS = 20  # fewer give no interval
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Sums:
    """Over the requests of one rule: their number, sums [4] and sums of products [4, 4] of `COLUMNS`."""

    requests: int
    sums: np.ndarray
    products: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.requests + other.requests, self.sums + other.sums, self.products + other.products)

    def ratio(self, above: Mapping[str, float], below: Mapping[str, float]) -> tuple[float, float | None]:
        """A ratio of linear combinations of the columns and the half width of its 95% interval, None where too few."""
        a, b = (np.array([weights.get(name, 0.0) for name in COLUMNS]) for weights in (above, below))
        value = float(a @ self.sums / (b @ self.sums))
        if self.requests < MIN_REQUESTS:
            return value, None
        rest = a - value * b
        squares = max(float(rest @ self.products @ rest), 0.0) * self.requests / (self.requests - 1)
        return value, NORMAL_95 * math.sqrt(squares) / float(b @ self.sums)


def find_shadow(folder: Path, given: str | Path | None = None) -> dict[str, Sums]:
    """Sums by rule from the files of a run folder, and from a named file or folder; engines of one rule are added up.

    Raises:
        InputError: a file that is not there, is no such file, or whose numbers cannot be.
    """
    paths = [path for pattern in FILES for path in sorted(folder.glob(pattern))]
    if given is not None:
        named = Path(given)
        if not named.exists():
            raise InputError(f"shadow={given} does not exist; name the engine's deferral.shadow_file")
        paths += sorted(named.glob("*.json")) if named.is_dir() else [named]
        if not paths:
            raise InputError(f"shadow={given} holds no JSON file; name the engine's deferral.shadow_file")
    found: dict[str, Sums] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        for rule, sums in _read(path).items():
            found[rule] = found[rule] + sums if rule in found else sums
    return found


def _read(path: Path) -> dict[str, Sums]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is no JSON ({error}); let the engine write it again") from error
    if not isinstance(content, Mapping) or content.get("kind") != "shadow":
        raise InputError(f"{path} is no shadow file; name the engine's deferral.shadow_file")
    if content.get("schema_version") != SCHEMA_VERSION or content.get("columns") != list(COLUMNS):
        raise InputError(
            f"{path} has schema_version {content.get('schema_version')!r}; this release reads {SCHEMA_VERSION}"
        )
    rules = content.get("rules")
    if not isinstance(rules, Mapping):
        raise InputError(f"{path}: rules is no object; let the engine write it again")
    return {str(rule): _sums(path, str(rule), entry) for rule, entry in rules.items()}


def _sums(path: Path, rule: str, entry: Any) -> Sums:
    size = len(COLUMNS)
    try:
        requests = int(entry["requests"])
        sums, products = np.array(entry["sums"], dtype=float), np.array(entry["products"], dtype=float)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise InputError(f"{path}: rule {rule!r} lacks numbers; let the engine write it again") from None
    where = f"{path}: rule {rule!r}: the identity"
    if sums.shape != (size,) or products.shape != (size, size):
        raise InputError(f"{where} `sums [4], products [4, 4]` does not hold; let the engine write it again")
    total = float(sums.sum())
    for holds, identity in (
        (math.isfinite(total) and bool(np.isfinite(products).all()), "all numbers are finite"),
        (1 <= requests <= sums[0], "1 <= requests <= blocks"),
        (bool((sums >= 0).all()), "sums >= 0"),
        # By Cauchy and Schwarz no mean of squares lies below the square of the mean.
        (bool((np.diag(products) * requests >= sums**2 * (1 - 1e-9)).all()), "n * sum x^2 >= (sum x)^2"),
    ):
        if not holds:
            raise InputError(f"{where} `{identity}` does not hold; let the engine write it again")
    return Sums(requests, sums, products)


def shadow(found: Mapping[str, Sums]) -> dict[str, Any] | None:
    """Rows of the section's table; None where no engine ran in shadow mode."""
    if not found:
        return None
    return {
        "rows": [{"rule": rule, **_row(sums)} for rule, sums in found.items()],
        "few": any(s.requests < MIN_REQUESTS for s in found.values()),
        "least": MIN_REQUESTS,
    }


def _row(sums: Sums) -> dict[str, Any]:
    blocks = {"blocks": 1.0}
    quantities: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]] = (
        ("lossless", {"blocks": 1.0, "served": 1.0}, blocks),
        ("switched", {"blocks": 1.0, "shadow": 1.0}, blocks),
        ("gain", {"shadow": 1.0, "served": -1.0}, blocks),
        ("loss", {"loss": 1.0}, {"blocks": 1.0, "shadow": 1.0}),
    )
    cells = {}
    for name, above, below in quantities:
        value, half = sums.ratio(above, below)
        ends = (None, None) if half is None else (value - half, value + half)
        cells[name] = cell({"value": value, "low": ends[0], "high": ends[1]})
    return {"requests": str(sums.requests), "blocks": f"{sums.sums[0]:.0f}", **cells}
