"""Tables of groups and numbers with intervals, and how they leave: JSON, CSV, text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train import provenance
from deferral_train.evaluation.bootstrap import MIN_PROMPTS, Interval, PromptBootstrap

FILE, CSV_FILE = "breakdowns.json", "breakdowns.csv"


@dataclass(frozen=True)
class Row:
    """One group.

    Attributes:
        group: its name. rule: whose decisions, None where no rule decides.
        prompts: that the numbers rest on. tokens: of these prompts in this group (expected ones by place).
        numbers: by name; what a group does not have is left out.
    """

    group: str
    rule: str | None
    prompts: int
    tokens: float
    numbers: Mapping[str, Interval]


@dataclass(frozen=True)
class Table:
    """``name``, what is said above it (``title``, ``note``), what its groups are (``by``), its rows."""

    name: str
    title: str
    by: str
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Redraws:
    """Bootstrap over the prompts that a number rests on; below ``MIN_PROMPTS`` of them there are no limits."""

    replicates: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval | None:
        """sum(numerator) / sum(denominator) over the prompts [P] where the denominator is not 0; None without any."""
        own = denominator > 0
        if not own.any():
            return None
        return self._of(int(own.sum())).ratio(numerator[own], denominator[own])

    def _of(self, prompts: int) -> PromptBootstrap:
        return _bootstrap(
            prompts, self.replicates if prompts >= MIN_PROMPTS else 0, self.seed, self.confidence
        )


@lru_cache(maxsize=16)
def _bootstrap(prompts: int, replicates: int, seed: int, confidence: float) -> PromptBootstrap:
    return PromptBootstrap(prompts, replicates, seed, confidence)


@dataclass(frozen=True)
class Breakdowns:
    """Tables of one evaluation; ``meta`` says what they were made with."""

    tables: Sequence[Table]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in ``breakdowns.json``."""
        return {"meta": dict(self.meta), "tables": [_plain(table) for table in self.tables]}

    def write(self, folder: str | Path) -> Path:
        """``breakdowns.json`` and ``breakdowns.csv`` (a line per number); returns the first."""
        path = Path(folder) / FILE
        provenance.write_json(path, self.as_dict())
        provenance.write_text(Path(folder) / CSV_FILE, self.csv())
        return path

    def csv(self) -> str:
        """Table, group, rule, prompts, tokens, quantity, value, low, high."""
        out = io.StringIO()
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(["table", "group", "rule", "prompts", "tokens", "quantity", "value", "low", "high"])
        for table in self.tables:
            for row in table.rows:
                for name, number in row.numbers.items():
                    start = [table.name, row.group, row.rule or "", row.prompts, row.tokens]
                    lines.writerow([*start, name, number.value, number.low, number.high])
        return out.getvalue()

    def text(self) -> str:
        """All tables, aligned."""
        return "\n\n".join(_text(table) for table in self.tables)


def quantities(rows: Sequence[Row]) -> list[str]:
    """Names of all numbers, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.numbers))


def _plain(table: Table) -> dict[str, Any]:
    rows = [
        {
            "group": row.group,
            "rule": row.rule,
            "prompts": row.prompts,
            "tokens": row.tokens,
            "numbers": {name: number.as_dict() for name, number in row.numbers.items()},
        }
        for row in table.rows
    ]
    return {"name": table.name, "title": table.title, "by": table.by, "note": table.note, "rows": rows}


def _text(table: Table) -> str:
    names = quantities(table.rows)
    with_rule = any(row.rule for row in table.rows)
    lines = [[table.by, *(["rule"] if with_rule else []), "prompts", "tokens", *names]]
    for row in table.rows:
        cells = [_cell(row.numbers.get(name)) for name in names]
        lines.append(
            [
                row.group,
                *([row.rule or "-"] if with_rule else []),
                str(row.prompts),
                f"{row.tokens:.0f}",
                *cells,
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    words = 2 if with_rule else 1
    aligned = [
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *aligned, *([table.note] if table.note else [])])


def _cell(number: Interval | None) -> str:
    if number is None:
        return "-"
    digits = 3 if abs(number.value) < 100 else 1
    limits = "" if number.low is None else f" [{number.low:.{digits}f}, {number.high:.{digits}f}]"
    return f"{number.value:.{digits}f}{limits}"
