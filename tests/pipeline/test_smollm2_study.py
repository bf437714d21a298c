"""The study of SmolLM2 compares settings at equal calls; numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.greedy_tree import Row
from benchmarks.studies.smollm2_gsm8k import compared, redrawn, sums_of

OWN = {"a": "it is 3", "b": "so 12"}
WEIGHTS = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])


def setting(calls: int, nats: tuple[float, float], last: str) -> dict[str, np.ndarray]:
    """Two texts of 10 tokens, the second one ending in ``last``; the first is the verifier's own."""
    rows = [
        Row("b", "rule", f"so {last}", None, [5] * 10, calls, nats[1]),
        Row("a", "rule", OWN["a"], None, [5] * 10, calls, nats[0]),
    ]
    return redrawn(sums_of(rows, OWN), WEIGHTS)


def test_rules_and_heads_at_equal_calls() -> None:
    lossless = setting(10, (-10.0, -10.0), "12")
    assert lossless["number"].tolist() == [100, 100, 100]
    groups = {
        "opt": [setting(5, (-20.0, -20.0), "7")],
        "token_v3": [setting(5, (-30.0, -30.0), "12")],
        "head: all": [setting(5, (-15.0, -16.0), "12")],
    }
    row = compared(groups, lossless)[1]
    assert row["calls"] == 0.7
    # 0.7 lies 0.4 of the way from 0.5 to 1: in nats a token, -2 + 0.4 for opt and -1.55 + 0.4 * 0.55 for the head.
    assert row["nats"]["opt"]["value"] == pytest.approx(-1.6)
    assert row["nats"]["head: all"]["value"] == pytest.approx(-1.33)
    assert row["nats"]["head: all"]["less_best_rule"] == pytest.approx(0.27)
    assert row["nats"]["head: all"]["high"] == pytest.approx(0.3, abs=0.01)  # redrawn: text a alone
    assert row["number"]["opt"]["value"] == pytest.approx(50 + 0.4 * 50)
    assert row["number"]["head: all"]["less_best_rule"] == pytest.approx(0)
    assert compared(groups, lossless)[2]["chrf1"]["token_v3"]["value"] == pytest.approx(100)
