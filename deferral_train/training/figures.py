"""Figures of a training run: regret against alpha, risk against rejection rate, reliability."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deferral_train.training.metrics import Calibration
from deferral_train.training.tracking import BASELINES, Tracker

LABELS = {"": "head", "_opt": "OPT", "_plug_in": "best plug-in (chosen on fit split)"}


def draw(tracker: Tracker, scalars: Mapping[str, float]) -> dict[str, Figure]:
    """Figures by tag, from a tracker whose ``scalars`` were computed and not yet reset."""
    figures = {
        "regret_vs_alpha": _regret(tracker, scalars),
        "risk_vs_rejection": _curves(tracker, scalars),
    }
    for name in ("gap", "tv", "reject"):
        if name in tracker.metrics:
            metric = tracker.metrics[name]
            assert isinstance(metric, Calibration)
            figures[f"reliability_{name}"] = _reliability(metric, name)
    return figures


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _series(tracker: Tracker, scalars: Mapping[str, float], name: str) -> list[float]:
    return [scalars[f"alpha/{name}@{alpha:g}"] for alpha in tracker.alphas]


def _regret(tracker: Tracker, scalars: Mapping[str, float]) -> Figure:
    if tracker.exact:
        figure, axes = _axes("Exact regret", "alpha", "mean regret")
        for suffix, label in LABELS.items():
            axes.plot(
                tracker.alphas, _series(tracker, scalars, f"exact_regret{suffix}"), marker=".", label=label
            )
    else:
        figure, axes = _axes(
            "Estimated L_spec, head minus rule", "alpha", "excess (negative: head is better)"
        )
        for name in BASELINES:
            label = LABELS[f"_{name}"]
            axes.plot(
                tracker.alphas, _series(tracker, scalars, f"excess_over_{name}"), marker=".", label=label
            )
        axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(fontsize=8)
    return figure


def _curves(tracker: Tracker, scalars: Mapping[str, float]) -> Figure:
    figure, axes = _axes("Risk against rejection rate", "rejection rate", "risk relative to the drafter")
    for suffix, label in LABELS.items():
        rate = _series(tracker, scalars, f"rejection_rate{suffix}")
        axes.plot(rate, _series(tracker, scalars, f"relative_risk{suffix}"), marker=".", label=label)
    axes.legend(fontsize=8)
    return figure


def _reliability(metric: Calibration, name: str) -> Figure:
    prediction, label, count = (values.cpu() for values in metric.reliability())
    figure, axes = _axes(f"Reliability of {name}", "mean prediction in bin", "mean label in bin")
    axes.plot([metric.low, metric.high], [metric.low, metric.high], color="black", linewidth=0.8)
    axes.scatter(prediction, label, s=10 + 90 * (count / count.max()).sqrt())
    return figure
