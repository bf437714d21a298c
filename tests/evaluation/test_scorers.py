"""Scorers by name, by program and by function: values, failures, and what is refused."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from deferral_train.errors import InputError
from deferral_train.evaluation.quality import METRICS
from deferral_train.evaluation.scorers import ProgramScorer, make_scorer, make_scorers

TEXTS = ["a dog runs on the grass", "two men", "a woman is reading a book in the park", ""]
REFERENCES = ["a dog is running on grass", "two men are talking", "a woman reads a book in a park", "a cat"]
PROGRAM = """
import json, sys, time
started = open(sys.argv[1], "a"); started.write("x"); started.close()
for line in sys.stdin:
    asked = json.loads(line)
    if asked["text"] == "sleep": time.sleep(60)
    if asked["text"] == "die": sys.exit(3)
    if asked["text"] == "nonsense": print("no json", flush=True); continue
    print(json.dumps({"score": min(1.0, len(asked["text"]) / 100 + (asked["reference"] == "r") / 2)}), flush=True)
"""


def test_sentence_metrics_are_sacrebleus() -> None:
    bleu, chrf = BLEU(effective_order=True, smooth_method="exp"), CHRF(beta=1)
    for text, reference in zip(TEXTS, REFERENCES):
        assert METRICS["sentence_bleu"](text, reference) == bleu.sentence_score(text, [reference]).score / 100
        assert METRICS["chrf1"](text, reference) == chrf.sentence_score(text, [reference]).score / 100
    found = make_scorer("sentence_bleu")(TEXTS, REFERENCES)
    assert found.shape == (4,)
    assert found[0] > found[3] == 0


@pytest.mark.parametrize(("metric", "own"), [("corpus_bleu", BLEU), ("corpus_chrf", CHRF)])
def test_a_corpus_metric_at_a_corpus_moves_as_the_corpus_score_does(metric: str, own: type) -> None:
    texts, references = TEXTS[:3] * 30, REFERENCES[:3] * 30
    scorer = make_scorer(metric)
    assert scorer.of_corpus(texts, references) == pytest.approx(
        own().corpus_score(texts, [references]).score / 100
    )
    bound = scorer.at(texts, references)
    better, worse = bound([REFERENCES[0], TEXTS[3]], [REFERENCES[0]] * 2)
    changed = [
        own().corpus_score([one, *texts[1:]], [references]).score / 100 for one in (REFERENCES[0], TEXTS[3])
    ]
    # n times what the corpus score loses; an average text gives way, not the first.
    assert better - worse == pytest.approx(90 * (changed[0] - changed[1]), rel=0.05)


def test_a_program_is_started_once_asked_once_per_text_and_may_fail(tmp_path: Path) -> None:
    script, starts = tmp_path / "score.py", tmp_path / "starts"
    script.write_text(PROGRAM)
    scorer = ProgramScorer(f"{sys.executable} {script} {starts}", patience=5)
    found = scorer(["abcd", "abcd", "ab"], ["r", None, "r"])
    assert found.tolist() == pytest.approx([0.54, 0.04, 0.52])
    assert starts.read_text() == "x"
    scorer.patience = 1.0
    failed = scorer(["sleep", "abcd", "die", "nonsense", "abc"], ["r"] * 5)
    assert np.isnan(failed).tolist() == [True, False, True, True, False]
    assert failed[4] == pytest.approx(0.53)
    assert starts.read_text() == "xxx"
    scorer.close()


def test_functions_are_imported_only_where_they_were_typed() -> None:
    name = f"{__name__}:half"
    assert make_scorers([name])[name](["x", "y"], [None, None]).tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match="imported only where it was typed"):
        make_scorer(name)
    with pytest.raises(InputError, match="cannot be imported"):
        make_scorers([f"{__name__}:nothing"])
    with pytest.raises(InputError, match=r"gave 2; a score must lie in \[0, 1\]"):
        make_scorers([f"{__name__}:twice"])[f"{__name__}:twice"](["x"], [None])


def test_a_program_that_never_reads_does_not_hold_a_long_text(tmp_path: Path) -> None:
    script = tmp_path / "deaf.py"
    script.write_text("import time\ntime.sleep(60)\n")
    scorer = ProgramScorer(f"{sys.executable} {script}", patience=1.0)
    started = time.monotonic()
    assert np.isnan(scorer(["x" * 2_000_000], ["r"])).all()  # more than a pipe holds
    assert time.monotonic() - started < 20
    scorer.close()


def test_what_a_function_raises_is_one_line() -> None:
    name = f"{__name__}:broken"
    with pytest.raises(
        InputError, match=r"broken failed on a text of 2 characters \(KeyError: 'gold'\)"
    ) as caught:
        make_scorers([name])[name](["ab"], [None])
    assert "\n" not in str(caught.value)


def broken(text: str, reference: str | None) -> float:
    return {}["gold"]  # type: ignore[no-any-return]


def half(text: str, reference: str | None) -> float:
    return 0.5


def twice(text: str, reference: str | None) -> float:
    return 2.0


@pytest.mark.parametrize("metric", ["blue", "command:no-such-program-here"])
def test_unknown_scorers_are_named(metric: str) -> None:
    with pytest.raises(InputError, match=metric):
        make_scorers([metric])
