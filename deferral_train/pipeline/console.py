"""Terminal output of a run: stages as they start and end, and the closing table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deferral_train.pipeline.stages import Stage, StageRecord

PIPE_WIDTH = 140  # a log has no width; rich would cut tables to 80


class RunConsole:
    """Plain lines in a pipe, colours in a terminal.

    Args:
        expected: stage to the seconds that it should take.
    """

    def __init__(self, expected: Mapping[str, float] | None = None) -> None:
        self.expected = dict(expected or {})
        self.console = Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = PIPE_WIDTH

    def announce(self, index: int, count: int, stage: Stage, record: StageRecord | None) -> None:
        """Say that a stage starts (no record), was reused, or is done."""
        if record is None:
            self.console.print(f"[bold]\\[{index}/{count}] {stage.name}[/bold]  {stage.title}")
        elif record.reused:
            self.console.print(
                f"[dim]\\[{index}/{count}] {stage.name}  reused, finished earlier in {record.seconds:.1f} s[/dim]"
            )
        else:
            expected = self.expected.get(stage.name)
            more = "" if expected is None else f" of {expected:.0f} expected"
            self.console.print(f"       {stage.name} done in {record.seconds:.1f} s{more}")

    def budget(self) -> None:
        """Say how long the run should take, stage by stage."""
        if self.expected:
            stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.expected.items())
            total = sum(self.expected.values()) / 60
            self.line(
                f"This takes about {total:.0f} minutes on the machine it was planned for; seconds: {stages}."
            )

    def spent(self, records: Iterable[StageRecord]) -> None:
        """Say how long the stages took, those of earlier runs included."""
        seconds = sum(record.seconds for record in records)
        expected = f" of {sum(self.expected.values()):.0f} expected" if self.expected else ""
        self.line(f"all stages took {seconds:.0f} s{expected}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """The short table a run ends with; the first column is left-aligned, numbers right."""
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
        for row in rows:
            table.add_row(*[_cell(value) for value in row])
        self.console.print(table)

    def line(self, text: str) -> None:
        """One line as it is: no markup is read from it."""
        self.console.print(text, markup=False)

    def indented(self, text: str) -> None:
        """A line about the stage that is running."""
        self.line(f"       {text}")

    def path(self, what: str, path: Path) -> None:
        """Name a file the reader will want to open."""
        self.line(f"{what:<12} {path}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
