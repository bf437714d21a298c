"""`deferral-train rules`: every rule with its dial and what it needs to see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deferral_train.rules.base import Rule


def run(markdown: bool = False) -> int:
    """Print every rule: the dial's name and range, the lossless and the drafter end, what the rule reads.

    Args:
        markdown: print a table for documents instead of columns.
    """
    from deferral_train.rules import RULES

    header = ("rule", "dial", "range", "lossless at", "drafter at", "stage", "reads")
    rows = [header, *(_row(name, rule) for name, rule in RULES.items())]
    if markdown:
        rows.insert(1, tuple("---" for _ in header))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def _row(name: str, rule: type[Rule]) -> tuple[str, ...]:
    dial = rule.dial
    needs = rule.needs if isinstance(rule.needs, frozenset) else None
    reads = "what its head reads" if needs is None else ", ".join(sorted(needs)) or "-"
    if dial is None:
        return (
            name,
            "-",
            "-",
            "always" if name in ("lossless", "verifier_only") else "-",
            "-",
            rule.stage,
            reads,
        )
    bounds = f"{dial.low:g} to {dial.high:g}" + (" (any finite)" if dial.unbounded else "")
    return (name, dial.parameter, bounds, _end(dial.lossless), _end(dial.drafter), str(rule.stage), reads)


def _end(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
