"""Figures by matplotlib, as png and svg: the curves of a score table, and quality against cost of decoded rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deferral_train.evaluation.frontier import COSTS as DECODED_COSTS
from deferral_train.evaluation.frontier import VERIFIER
from deferral_train.evaluation.table import COSTS, LOSSES, ScoreTable

LABELS = {
    "rejection_rate": "rejection rate",
    "calls_per_token": "verifier calls per token (predicted)",
    "relative_latency": "time relative to the verifier alone (predicted)",
    "risk": "risk",
    "emitted_risk": "risk of the emitted token",
}


def draw_scores(table: ScoreTable, folder: str | Path) -> list[Path]:
    """One figure per loss and cost that the table holds; returns the files."""
    written = []
    for loss in LOSSES:
        for cost in COSTS:
            names = [name for name in table.swept if {loss, cost} <= set(table[name].metrics)]
            if names:
                figure = _figure()
                _draw_curves(figure.subplots(), table, names, loss, cost)
                written += _save(figure, Path(folder), f"{loss}_against_{cost}")
    return written


def draw_frontier(entry: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Quality against each cost of one temperature's entry of ``frontier.json``; returns the files."""
    metric, temperature, written = entry["metric"], entry["temperature"], []
    for cost, label in DECODED_COSTS.items():
        figure = _figure()
        axes = figure.subplots()
        for name, line in entry["points"].items():
            ordered = sorted(line, key=lambda point: point[cost])
            alone = len(line) == 1
            style = {"marker": "*", "ms": 11, "linestyle": "none"} if alone else {"marker": "o", "ms": 4}
            axes.plot([p[cost] for p in ordered], [p["quality"] for p in ordered], label=name, **style)
        axes.axhline(entry["points"][VERIFIER][0]["quality"], color="gray", linestyle=":", linewidth=1)
        title = f"T = {temperature:g}, {entry['prompts']} prompts"
        axes.set(xlabel=label, ylabel=metric, title=title)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        written += _save(figure, Path(folder), f"{metric.split(':')[0]}_against_{cost}_t{temperature:g}")
    return written


def _figure() -> Any:
    """A figure of its own, outside of pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        # Without its date an svg is the same file each time.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _draw_curves(axes: Any, table: ScoreTable, names: list[str], loss: str, cost: str) -> None:
    for name in names:
        curve = table.curve(name, loss, cost)
        order = curve.x.argsort(kind="stable")
        (line,) = axes.plot(
            curve.x[order],
            curve.y[order],
            label=name,
            linestyle="--" if name == "oracle" else "-",
            marker=".",
            ms=4,
        )
        if curve.y_redrawn.shape[1]:
            low, high = table.bootstrap.percentiles(curve.y_redrawn)
            axes.fill_between(curve.x[order], low[order], high[order], alpha=0.1, color=line.get_color())
    axes.set(
        xlabel=LABELS[cost], ylabel=f"{LABELS[loss]} ({table.meta['loss']}, truth {table.meta['truth']})"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
