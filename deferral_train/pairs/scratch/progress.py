"""Progress bars of a pair's training: steps, tokens a second, loss, time left; plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deferral_train.pairs.scratch.optimise import Report

SMOOTHING = 0.98  # of the shown loss
EVERY = 30.0  # seconds between plain lines


class TrainingBars:
    """A context manager that ``train_pair`` calls with a model's name and number of steps."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f} steps  {task.fields[rate]:>7,.0f} tokens/s"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> TrainingBars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, name: str, steps: int) -> Report:
        """A report for one model's training; its loss is a running mean in nats a token."""
        task = self.progress.add_task(name, total=steps, rate=0.0, loss=0.0)
        begun = time.monotonic()
        state = {"tokens": 0.0, "loss": 0.0, "said": begun, "first": 0.0}

        def left(step: int) -> str:
            if step == steps:
                return ""
            seconds = (time.monotonic() - begun) / (step + 1 - state["first"]) * (steps - step)
            return f", {seconds / 60:.0f} min left" if seconds >= 60 else f", {seconds:.0f} s left"

        def report(step: int, tokens: int, loss: float) -> None:
            state["first"] = state["first"] or step  # one that continues does not begin at 1
            state["loss"] = SMOOTHING * state["loss"] + (1 - SMOOTHING) * loss if state["tokens"] else loss
            state["tokens"] += tokens
            now = time.monotonic()
            rate = state["tokens"] / max(now - begun, 1e-9)
            self.progress.update(task, completed=step, rate=rate, loss=state["loss"])
            if not self.console.is_terminal and (now - state["said"] > EVERY or step == steps):
                state["said"] = now
                text = (
                    f"{name}: step {step}/{steps}, {rate:,.0f} tokens/s, loss {state['loss']:.3f}{left(step)}"
                )
                self.console.print(text, markup=False, highlight=False)

        return report
