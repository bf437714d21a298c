"""The table of methods: dials around wished calls, counts over samples, and what a cell says."""

from __future__ import annotations

import numpy as np
import pytest
from decoding.helpers import pair_of

from benchmarks import methods
from benchmarks.methods import HEAD, Bench, cells, dials_around, undefined
from benchmarks.sequence_labels import LOSSLESS, Counts
from deferral_train.decoding import Pair
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import make_rule


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(methods, "NEW_TOKENS", 8)
    prompts = [Prompt(f"p{n}", f"w{n} w{n + 3} w1", "w1 w2 w3 w4") for n in range(5)]
    return Bench(Pair(make_pair(*pair_of("t5"))), prompts, prompts[:3], 2)


def test_dials_lie_where_the_calls_of_the_pilot_do(bench: Bench) -> None:
    rule, tried = make_rule("opt"), [-1.5, 0.0, 0.3, 1.0]
    calls = [bench.calls(rule.with_dial(value), 0.0) for value in tried]
    assert calls[0] > calls[-1]
    found = dials_around(bench, rule, tried, 0.0, (calls[0] + calls[-1]) / 2)
    assert all(-1.5 <= one.dial_value <= 1.0 for one in found)
    assert len(found) >= 2
    (nearest,) = dials_around(bench, rule, [-1.5], 0.0, calls[-1])
    assert nearest.dial_value == -1.5


def test_counts_are_added_over_samples(bench: Bench) -> None:
    rule = make_rule("lossless")
    both = bench.counts(rule, 1.0, {})
    parts = [
        Bench(bench.pair, bench.prompts, bench.pilot, 1).decode(rule, 1.0, bench.prompts, seed)
        for seed in (0, 1)
    ]
    emitted = [sum(part[n]["counts"]["emitted"] for part in parts) for n in range(5)]
    assert both.emitted[:, 0].tolist() == emitted


def counts(calls: float, quality: float) -> Counts:
    """Four prompts of ten emitted tokens and a BLEU, chrF and TER that grow with ``quality``."""
    prompts = np.arange(4)[:, None] + 1.0
    bleu = np.hstack([10 * prompts, 10 * prompts, *[prompts * quality] * 4, *[10 * prompts] * 4])
    chrf = np.hstack([part for _ in range(6) for part in (10 * prompts, 10 * prompts, prompts * quality)])
    ter = np.hstack([10 * prompts - prompts * quality, 10 * prompts])
    return Counts(bleu, chrf, ter, 10 * prompts, calls * prompts, 10 * prompts)


def test_a_cell_is_read_at_matched_calls_and_less_the_head() -> None:
    weights = np.vstack([np.ones(4), np.random.default_rng(0).multinomial(4, [0.25] * 4, 30)]).astype(float)
    found = {
        LOSSLESS: [counts(10, 8)],
        HEAD: [counts(6, 4), counts(8, 6)],
        "same": [counts(6, 4), counts(8, 6)],
        "worse": [counts(6, 2), counts(8, 4)],
        "unreached": [counts(9, 7), counts(9.5, 7)],
    }
    rows = cells(found, 0.7, weights)
    assert rows["same"]["chrf"]["less_head"] == 0 == rows[HEAD]["chrf"]["less_head"]
    assert rows["worse"]["chrf"]["value"] == pytest.approx(30)
    assert rows["worse"]["chrf"]["less_head"] == pytest.approx(-20)
    assert rows["worse"]["chrf"]["high"] < 0
    assert np.isnan(rows["unreached"]["chrf"]["value"])
    assert rows["unreached"]["fewest_calls"] == pytest.approx(0.9)


def test_what_is_lossless_when_greedy_has_no_cell() -> None:
    for name in ("ears", "lossy"):
        assert undefined(make_rule(name), 0.0) == "lossless at temperature 0"
        assert undefined(make_rule(name), 1.0) is None
    assert undefined(make_rule("fly"), 0.0) is None
