"""Choosing a setting: from decoded outputs with a certificate, by verifier calls, from traces; and every
refusal.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from deferral_train.errors import InputError
from deferral_train.evaluation.choose import choose_from_outputs, choose_from_traces
from deferral_train.evaluation.settings import in_order, parse_label, setting_of
from deferral_train.traces import Traces
from evaluation.language import VOCABULARY, Language

ALPHAS = (0.0, 0.1, 0.2, 0.4)


def outputs(wrong: dict[str, list[int]], prompts: int, calls: dict[str, int]) -> list[dict]:
    """Rows as decode writes them: lossless is always right, a label is wrong on the listed prompts."""
    return [
        {
            "id": f"p{number}",
            "rule": label,
            "repetition": 0,
            "text": "no" if number in set(where) else "yes",
            "reference": "yes",
            "counts": {"verifier_calls": calls[label], "emitted": 20},
        }
        for label, where in wrong.items()
        for number in range(prompts)
    ]


def opt_outputs(prompts: int = 400) -> list[dict]:
    wrong = {"lossless": [], "opt:alpha=0.4": list(range(60)), "opt:alpha=0.1": [3], "opt:alpha=0.2": [3, 5]}
    return outputs(
        wrong, prompts, {"lossless": 10, "opt:alpha=0.1": 8, "opt:alpha=0.2": 6, "opt:alpha=0.4": 4}
    )


def test_boldest_certified_setting_is_chosen_with_its_evidence() -> None:
    choice = choose_from_outputs(opt_outputs(), metric="exact_match", max_loss=0.05)
    assert choice.setting.label == "opt:alpha=0.2"
    assert choice.calls == pytest.approx(0.6)
    assert choice.mean == pytest.approx(2 / 400)
    certificate = choice.certificate()
    assert certificate["kind"] == "certificate"
    assert certificate["p_value"] <= 0.05
    assert (certificate["rule"], certificate["parameter"], certificate["value"]) == ("opt", "alpha", 0.2)


def test_order_of_the_dial_not_of_the_file_decides_what_is_tested() -> None:
    values = [s.value for s in in_order([parse_label(f"opt:alpha={a}") for a in (0.4, 0.0, 0.2)])]  # type: ignore[misc]
    assert values == [0.0, 0.2, 0.4]
    # Typical acceptance and others may have their lossless end at the top of the dial.
    margins = [parse_label(f"judge:threshold={a}") for a in (0.2, 1.0)]
    assert [s.value for s in in_order(margins)] == [1.0, 0.2]  # type: ignore[misc]
    assert parse_label("lossless") is None
    assert parse_label("learned:head=runs/a=b,alpha=0.1").value == 0.1  # type: ignore[union-attr]


def test_labels_that_do_not_say_their_dial_are_read_from_the_summary() -> None:
    """A run calls its rules `opt` and `learned`; what the dial stood at is in the summary."""
    rows = outputs(
        {"lossless": [], "learned": [3], "opt": list(range(90))},
        400,
        {"lossless": 10, "learned": 6, "opt": 5},
    )
    dials = {
        "lossless": None,
        "learned": {"rule": "learned", "parameter": "alpha", "value": 0.3},
        "opt": {"rule": "opt", "parameter": "alpha", "value": 0.2},
    }
    with pytest.raises(InputError, match="no setting to choose from"):
        choose_from_outputs(rows, metric="exact_match", max_loss=0.05)
    choice = choose_from_outputs(rows, metric="exact_match", max_loss=0.05, dials=dials)
    assert (choice.setting.label, choice.setting.rule, choice.setting.value) == ("learned", "learned", 0.3)
    assert setting_of("learned:head=runs/a,alpha=0.1").rule == "learned"  # type: ignore[union-attr]
    assert setting_of("opt:alpha=1e-3").value == 1e-3  # type: ignore[union-attr]


def test_two_rules_share_the_error_probability() -> None:
    rows = opt_outputs()
    second = [
        {**row, "rule": row["rule"].replace("opt", "diff")} for row in rows if row["rule"] != "lossless"
    ]
    choice = choose_from_outputs(rows + second, metric="exact_match", max_loss=0.05)
    alone = choose_from_outputs(rows, metric="exact_match", max_loss=0.05)
    assert choice.setting.value == alone.setting.value
    assert choice.smallest is not None
    assert alone.smallest is not None
    assert choice.smallest > alone.smallest
    assert (
        choose_from_outputs(rows + second, metric="exact_match", max_loss=0.05, rule="diff").setting.rule
        == "diff"
    )


def test_fewer_calls_takes_the_setting_nearest_to_lossless() -> None:
    choice = choose_from_outputs(opt_outputs(), max_verifier_calls=0.7)
    assert choice.setting.label == "opt:alpha=0.2"
    assert choice.kind == "bootstrap"
    with pytest.raises(InputError, match=r"nearest: opt:alpha=0.4 with at most 0.400"):
        choose_from_outputs(opt_outputs(), max_verifier_calls=0.3)


def test_wishes_that_cannot_be_met_name_what_can() -> None:
    rows = opt_outputs(60)
    bad = outputs(
        {"lossless": [], "opt:alpha=0.1": list(range(100))}, 400, {"lossless": 10, "opt:alpha=0.1": 5}
    )
    cases = [
        (
            r"smallest loss that they can certify at confidence 0.95 is 0\.0\d+; \d+ prompts would do",
            rows,
            0.01,
        ),
        (r"no setting keeps .* nearest: opt:alpha=0.1 certifies 0\.3", bad, 0.1),
    ]
    for message, given, limit in cases:
        with pytest.raises(InputError, match=message):
            choose_from_outputs(given, metric="exact_match", max_loss=limit)
    with pytest.raises(InputError, match=r"fewest verifier calls are 0\.600 of lossless's"):
        choose_from_outputs(opt_outputs(), metric="exact_match", max_loss=0.05, max_verifier_calls=0.5)


def test_bad_input_is_one_clear_line() -> None:
    rows = opt_outputs(30)
    without = [{**row, "reference": None} for row in opt_outputs()]
    cases = [
        ("give a constraint", lambda: choose_from_outputs(rows)),
        ("needs a metric", lambda: choose_from_outputs(rows, max_loss=0.1)),
        ("metric is 'bleurt'", lambda: choose_from_outputs(opt_outputs(), metric="bleurt", max_loss=0.1)),
        ("corpus score", lambda: choose_from_outputs(opt_outputs(), metric="bleu", max_loss=0.1)),
        (
            "needs references, and 400 of 400",
            lambda: choose_from_outputs(without, metric="chrf", max_loss=0.1),
        ),
        ("max_loss=1 allows any", lambda: choose_from_outputs(opt_outputs(), metric="chrf", max_loss=1)),
        (
            "confidence=1.2 must lie",
            lambda: choose_from_outputs(opt_outputs(), metric="chrf", max_loss=0.1, confidence=1.2),
        ),
        ("metric is 'bleurt'", lambda: choose_from_outputs([], metric="bleurt", max_verifier_calls=0.5)),
        ("no such program", lambda: choose_from_outputs([], metric="command:no-such-program-x")),
        ("needs at least 10 prompts", lambda: choose_from_outputs(opt_outputs(9), max_verifier_calls=0.5)),
        ("no rule lossless", lambda: choose_from_outputs(rows[30:], max_verifier_calls=0.5)),
        ("no setting of chow", lambda: choose_from_outputs(rows, max_verifier_calls=0.5, rule="chow")),
    ]
    for message, call in cases:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_from_traces_the_claim_is_about_local_tokens(traces: Traces) -> None:
    choice = choose_from_traces(traces, "opt", 0.1)
    assert choice.kind == "local token risk"
    assert choice.mean <= 0.1
    with pytest.raises(InputError, match=r"max_token_risk=0.001 .* the smallest loss that they can certify"):
        choose_from_traces(traces, "opt", 0.001)


def test_token_risk_certificate_holds_on_the_language_it_was_drawn_from() -> None:
    """The pool of prompts is the population; 1,000 calibration sets drawn from it with replacement.

    A violation is a chosen alpha whose mean over the pool breaks the limit; at most 10% plus its 99%
    tolerance.
    """
    import tempfile
    from pathlib import Path

    from deferral_train.evaluation.certificate import fixed_sequence
    from deferral_train.evaluation.choose import _token_losses

    with tempfile.TemporaryDirectory() as folder:
        pool = Language(300, seed=3).write(Path(folder) / "pool", 1.0, VOCABULARY)
        losses = _token_losses(pool, "opt", "opt", "exact", 0.0, 15)
    known = losses.mean(axis=1)
    limit = float(known[7]) * 0.98
    bold = known > limit
    assert bold.any()
    assert not bold[0]
    generator = np.random.default_rng(0)
    draws, violations, useful = 1000, 0, 0
    first_bad = int(np.argmax(bold))
    for _ in range(draws):
        sample = losses[:, generator.integers(0, 300, size=150)]
        certified = fixed_sequence(sample, limit, 0.9, low=-1, high=1).certified
        violations += certified > first_bad
        useful += certified > 0
    assert violations <= binom.ppf(0.99, draws, 0.1)
    assert useful > 0.5 * draws
