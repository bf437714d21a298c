"""Tables of groups and numbers with intervals, and how they leave: JSON, CSV, text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train import provenance
from deferral_train.evaluation.bootstrap import Interval

FILE, CSV_FILE = "breakdowns.json", "breakdowns.csv"


@dataclass(frozen=True)
class Row:
    """One group.

    Attributes:
        group: its name.
        rule: whose decisions, None where no rule decides.
        prompts: that the numbers rest on.
        tokens: of these prompts in this group (by draft index, expected ones).
        numbers: by name; what a group does not have is left out.
    """

    group: str
    rule: str | None
    prompts: int
    tokens: float
    numbers: Mapping[str, Interval]

    @classmethod
    def of(
        cls, group: str, rule: str | None, tokens: np.ndarray, numbers: Mapping[str, Interval | None]
    ) -> Row:
        """From the tokens of each prompt [P]; prompts without any do not count, nor do numbers that are None."""
        known = {name: number for name, number in numbers.items() if number is not None}
        return cls(group, rule, int((tokens > 0).sum()), float(tokens.sum()), known)


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: in files.
        title: shown above it.
        by: heading of the groups.
        rows: in order.
        note: shown below it.
    """

    name: str
    title: str
    by: str
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Breakdowns:
    """Tables of one evaluation; ``meta`` says what they were made with."""

    tables: Sequence[Table]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in ``breakdowns.json``."""
        return {"meta": dict(self.meta), "tables": [asdict(table) for table in self.tables]}

    def write(self, folder: str | Path) -> Path:
        """``breakdowns.json`` and ``breakdowns.csv`` (a line per number); returns the first."""
        path = Path(folder) / FILE
        provenance.write_json(path, self.as_dict())
        provenance.write_text(Path(folder) / CSV_FILE, self.csv())
        return path

    def csv(self) -> str:
        """Table, group, rule, prompts, tokens, quantity, value, low, high; a line per number."""
        import pandas

        names = ["table", "group", "rule", "prompts", "tokens", "quantity", "value", "low", "high"]
        lines = [
            (
                table.name,
                row.group,
                row.rule,
                row.prompts,
                row.tokens,
                name,
                number.value,
                number.low,
                number.high,
            )
            for table in self.tables
            for row in table.rows
            for name, number in row.numbers.items()
        ]
        return pandas.DataFrame(lines, columns=names).to_csv(index=False, lineterminator="\n")

    def text(self) -> str:
        """All tables, aligned."""
        return "\n\n".join(_text(table) for table in self.tables)


def quantities(rows: Sequence[Row]) -> list[str]:
    """Names of all numbers, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.numbers))


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
