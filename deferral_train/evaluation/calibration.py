"""Is an estimated loss gap right on average? Predicted against observed in bins of equal count."""

from __future__ import annotations

from typing import Any

import numpy as np

from deferral_train.evaluation.bootstrap import PromptBootstrap


def reliability(
    predicted: np.ndarray,
    observed: np.ndarray,
    prompt: np.ndarray,
    bootstrap: PromptBootstrap,
    bins: int = 10,
) -> dict[str, Any]:
    """Reliability of an estimate of a mean.

    Args:
        predicted: [N] estimates. observed: [N] unbiased labels of the same quantity.
        prompt: [N] prompt number 0..P-1 of each row.
        bins: of equal count by prediction; equal predictions share a bin, so there may be fewer.

    Returns:
        ``bins``: mean prediction and mean label with interval, rows; ``calibration_error``: mean
        |difference| of the two over bins, weighted by rows (ECE of a regression); ``bias``: mean of
        prediction minus label; ``correlation`` of the two over rows.
    """
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, predicted, side="right")
    rows: list[dict[str, Any]] = []
    for number in np.unique(place):
        inside = place == number
        count, total = (
            np.bincount(prompt[inside], weights=weights, minlength=bootstrap.prompts)
            for weights in (None, observed[inside].astype(np.float64))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            label = _finite(bootstrap, total, count)
        rows.append(
            {"predicted": float(predicted[inside].mean()), "rows": int(inside.sum()), "observed": label}
        )
    weights = np.array([row["rows"] for row in rows]) / len(predicted)
    errors = np.array([abs(row["predicted"] - row["observed"]["value"]) for row in rows])
    varies = predicted.std() > 0 and observed.std() > 0
    return {
        "bins": rows,
        "calibration_error": float(weights @ errors),
        "bias": float(predicted.mean(dtype=np.float64) - observed.mean(dtype=np.float64)),
        "correlation": float(np.corrcoef(predicted, observed)[0, 1]) if varies else None,
    }


def _finite(bootstrap: PromptBootstrap, total: np.ndarray, count: np.ndarray) -> dict[str, float | None]:
    """Interval of total/count; limits are left out where a redraw has no row in the bin."""
    interval = bootstrap.ratio(total, count).as_dict()
    if not all(limit is None or np.isfinite(limit) for limit in interval.values()):
        return {"value": interval["value"], "low": None, "high": None}
    return interval
