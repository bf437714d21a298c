"""The report's curves for TensorBoard: risk against rejection rate, offline; quality against latency, decoded.

Figures show a whole curve as it is on the page. Scalars let TensorBoard lay curves of several runs over each other:
their step is the cost in thousandths, so that the axis of steps is the axis of costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deferral_train.report.load import RunFolder

FOLDER = "tensorboard"
THOUSANDTHS = 1000


def write_board(run: RunFolder, folder: str | Path | None = None) -> Path | None:
    """Write an event file with every curve that the run holds; None where it holds none.

    Args:
        run: as loaded. folder: default ``tensorboard`` inside the run folder; replaced as a whole.
    """
    curves = list(_curves(run))
    if not curves:
        return None
    from torch.utils.tensorboard import SummaryWriter

    target = Path(folder) if folder is not None else run.folder / FOLDER
    for old in target.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(target)) as writer:
        for title, labels, lines in curves:
            for name, points in lines.items():
                for x, y in points:
                    writer.add_scalar(f"{title}/{name}", y, round(x * THOUSANDTHS))
            writer.add_figure(f"figures/{title}", _figure(title, labels, lines))
    return target


Lines = Mapping[str, Sequence[tuple[float, float]]]


def _curves(run: RunFolder) -> Iterator[tuple[str, tuple[str, str], Lines]]:
    """(title, labels of the axes, rule to points in order of cost)."""
    if run.scores is not None:
        for loss in ("risk", "emitted_risk"):
            lines = _scored(run.scores["points"], loss)
            if lines:
                yield f"{loss}_against_rejection_rate", ("rejection rate", loss), lines
    for entry in (run.frontier or {}).get("entries", ()):
        for cost in ("latency", "rejection_rate", "deferral_rate", "calls_per_token"):
            title = f"{entry['metric']}_against_{cost}_t{entry['temperature']:g}"
            yield title, (cost, entry["metric"]), _decoded(entry["points"], cost)


def _scored(points: Sequence[Mapping[str, Any]], loss: str) -> Lines:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if loss in point:
            lines.setdefault(point["rule"], []).append(
                (point["rejection_rate"]["value"], point[loss]["value"])
            )
    return {name: sorted(line) for name, line in lines.items()}


def _decoded(points: Mapping[str, Sequence[Mapping[str, Any]]], cost: str) -> Lines:
    return {name: sorted((p[cost], p["quality"]) for p in line) for name, line in points.items()}


def _figure(title: str, labels: tuple[str, str], lines: Lines) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points), marker="." if len(points) > 1 else "*", label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure
