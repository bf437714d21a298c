"""Two runs of the same prompts: where texts part, and which differences a tie explains."""

from __future__ import annotations

from deferral_train.evaluation.agreement import TIE, agreements


def row(rule, name, tokens, log=None, repetition=0):
    found = {"rule": rule, "id": name, "repetition": repetition, "tokens": tokens}
    return found if log is None else found | {"token_log": log}


def entry(verifier, drafter=None):
    found = {"verifier_top": [[5, -0.5], [6, -0.5 - verifier]]}
    return found if drafter is None else found | {"drafter_top": [[5, -0.2], [6, -0.2 - drafter]]}


def test_texts_part_at_the_first_other_token_and_ties_are_told_apart():
    first = [
        row("opt", "a", [1, 2, 3]),
        row("opt", "b", [1, 2, 3], [entry(1.0), entry(TIE / 2, 1.0), entry(0.0)]),
        row("opt", "c", [1, 2, 3], [entry(0.0), entry(0.0), entry(0.3, TIE / 2)]),
        row("opt", "d", [1, 2, 3], [entry(0.0), entry(0.0), entry(0.0), entry(0.0)]),
        row("opt", "e", [4, 2], [entry(0.3, 0.2), entry(0.0)]),
        row("opt", "f", [1], []),
        row("opt", "a", [9], repetition=1),
        row("lossless", "a", [1]),
    ]
    second = [
        row("opt", "a", [1, 2, 3]),
        row("opt", "b", [1, 4, 3]),
        row("opt", "c", [1, 2, 4]),
        row("opt", "d", [1, 2]),
        row("opt", "e", [1, 2]),
        row("opt", "g", [1]),
        row("token_v3", "a", [1]),
    ]
    found = agreements(first, second)
    assert set(found) == {"opt"}
    opt = found["opt"]
    assert (opt.prompts, opt.same) == (5, 1)
    assert [(one.prompt, one.place, one.tie) for one in opt.differences] == [
        ("b", 1, True),
        ("c", 2, True),
        ("d", 2, True),
        ("e", 0, False),
    ]
    assert opt.ties == 3


def test_without_a_token_log_nothing_is_called_a_tie():
    (found,) = agreements([row("opt", "a", [1, 2])], [row("opt", "a", [1, 3])]).values()
    assert [(one.verifier_gap, one.drafter_gap, one.tie) for one in found.differences] == [
        (None, None, False)
    ]
