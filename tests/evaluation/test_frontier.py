from pathlib import Path

import pytest

from deferral_train.errors import InputError
from deferral_train.evaluation.frontier import decoded_points, draw_figures, table2


def rule(bleu: float, ms: float) -> dict:
    return {"quality": {"bleu": bleu}, "ms_per_token": ms, "deferral_rate": 0.5, "rejection_rate": 0.1}


SUMMARY = {
    "rules": {
        "verifier_only": rule(30.0, 10.0),
        "lossless": rule(30.0, 8.0),
        "opt:alpha=0.4": rule(24.0, 4.0),
        "opt:alpha=0.2": rule(28.0, 5.0),
        "opt:alpha=0.1": rule(32.0, 9.0),
        "diff:alpha=0.1": rule(26.0, 12.0),
    }
}


def test_table_2_by_hand() -> None:
    rows = {row["rule"]: row for row in table2(decoded_points(SUMMARY))}
    # Half-way between 28 at 0.5 and 32 at 0.9 lies 30 at 0.7.
    assert rows["opt"]["speedup_at_quality"] == pytest.approx(1 / 0.7)
    assert rows["opt"]["best_quality_within_latency"] == 32.0
    assert rows["opt"]["settings"] == 3
    assert rows["lossless"]["speedup_at_quality"] == pytest.approx(1.25)
    assert rows["diff"]["speedup_at_quality"] is None
    assert rows["diff"]["best_quality_within_latency"] is None
    assert "verifier_only" not in rows


def test_figures_are_written(tmp_path: Path) -> None:
    files = draw_figures(decoded_points(SUMMARY), tmp_path, "bleu")
    assert len(files) == 6
    assert all(path.stat().st_size > 1000 for path in files)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="decode it beside the others"):
        decoded_points({"rules": {"lossless": rule(1.0, 1.0)}})
    with pytest.raises(InputError, match="metric 'rouge2' is not in the summary; it holds bleu"):
        decoded_points(SUMMARY, "rouge2")
