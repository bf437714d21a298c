"""The table's curves as png and svg, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from deferral_train.evaluation.table import COSTS, LOSSES, ScoreTable

LABELS = {
    "rejection_rate": "rejection rate",
    "calls_per_token": "verifier calls per token (predicted)",
    "relative_latency": "time relative to the verifier alone (predicted)",
    "risk": "risk",
    "emitted_risk": "risk of the emitted token",
}


def draw(table: ScoreTable, folder: Path) -> list[Path]:
    """One figure per loss and cost that the table holds, each as png and svg; returns the files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for loss in LOSSES:
        for cost in COSTS:
            names = [name for name in table.swept if {loss, cost} <= set(table[name].metrics)]
            if not names:
                continue
            figure = Figure(figsize=(7, 4.5), layout="constrained")
            FigureCanvasAgg(figure)
            _draw_one(figure.subplots(), table, names, loss, cost)
            for suffix in ("png", "svg"):
                path = folder / f"{loss}_against_{cost}.{suffix}"
                figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
                written.append(path)
    return written


def _draw_one(axes, table: ScoreTable, names: list[str], loss: str, cost: str) -> None:  # type: ignore[no-untyped-def]
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
