import json
from pathlib import Path

import pytest

from deferral_train.errors import InputError
from deferral_train.evaluation.figures import draw_frontier
from deferral_train.evaluation.frontier import decoded_points, frontier_of, table2, write_frontier


def rule(bleu: float, seconds: float) -> dict:
    return {"quality": {"bleu": bleu}, "seconds": seconds, "deferral_rate": 0.5, "rejection_rate": 0.1}


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
    entries = [frontier_of({**SUMMARY, "settings": {"temperature": t}}, "bleu") for t in (0.0, 0.5)]
    write_frontier(entries, tmp_path)
    files = [path for entry in entries for path in draw_frontier(entry, tmp_path / "frontier")]
    assert len(files) == len(set(files)) == 16
    assert all(path.stat().st_size > 1000 for path in files)
    stored = json.loads((tmp_path / "frontier.json").read_text())["entries"]
    assert [entry["temperature"] for entry in stored] == [0.0, 0.5]
    assert stored[0]["points"]["verifier_only"][0]["deferral_rate"] == 1.0  # it leaves every token to itself
    assert [p["label"] for p in stored[0]["points"]["opt"]] == [
        "opt:alpha=0.4",
        "opt:alpha=0.2",
        "opt:alpha=0.1",
    ]


def test_latency_is_wall_clock_of_the_same_prompts_with_an_interval_over_batches() -> None:
    """Twelve batches; `opt` takes half the verifier's time on each, whatever it emits."""
    batches = [
        {"rule": label, "repetition": r, "batch": b, "seconds": s * (1 + b)}
        for label, s in (("verifier_only", 2.0), ("opt:alpha=0.1", 1.0))
        for r in range(3)
        for b in range(12)
    ]
    point = decoded_points(SUMMARY, "bleu", batches)["opt"][-1]
    assert point.label == "opt:alpha=0.1"
    assert (point.latency, point.latency_low, point.latency_high) == pytest.approx((0.5, 0.5, 0.5))


def test_settings_of_one_rule_are_joined_whatever_their_labels_say() -> None:
    summary = {"rules": {**SUMMARY["rules"], "mine": rule(27.0, 6.0)}}
    summary["rules"]["mine"]["dial"] = {"rule": "opt", "parameter": "alpha", "value": 0.3}
    assert [point.label for point in decoded_points(summary)["mine"]] == ["mine"]


def test_bad_input() -> None:
    with pytest.raises(InputError, match="decode it beside the others"):
        decoded_points({"rules": {"lossless": rule(1.0, 1.0)}})
    with pytest.raises(InputError, match="metric 'rouge2' is not in the summary; it holds bleu"):
        decoded_points(SUMMARY, "rouge2")
