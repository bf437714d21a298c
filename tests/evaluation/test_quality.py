import gzip
import json
import random
import sys
from collections import Counter

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from deferral_train.errors import InputError
from deferral_train.evaluation.online import online_table
from deferral_train.evaluation.quality import corpus_bleu, per_prompt

SQUAD = [("The Eiffel Tower!", "Eiffel tower", 1.0), ("in Paris, France", "Paris", 0.5), ("", "x", 0.0)]
GSM = [
    ("so 4+4 = 8.\n#### 8", "#### 8", 1.0),
    ("the answer is 1,200", "... #### 1200", 1.0),
    ("7 eggs", "#### 8", 0.0),
]


@pytest.mark.parametrize(("metric", "cases"), [("squad_f1", SQUAD), ("gsm8k", GSM)])
def test_metrics_on_cases_done_by_hand(metric: str, cases: list[tuple[str, str, float]]) -> None:
    texts, references, expected = zip(*cases)
    np.testing.assert_allclose(per_prompt(metric, texts, references), expected)


def test_chrf_is_sacrebleus_and_rouge_is_between_its_bounds() -> None:
    text, reference = "the small cat sat", "the cat sat down"
    expected = CHRF().sentence_score(text, [reference]).score / 100
    assert per_prompt("chrf", [text], [reference])[0] == pytest.approx(expected)
    assert per_prompt("rouge1", [text], [reference])[0] == pytest.approx(0.75)
    assert per_prompt("rougeL", [reference], [reference])[0] == pytest.approx(1.0)
    assert corpus_bleu([reference], [reference]) == pytest.approx(100.0)


def _grams(words: list[str], size: int) -> Counter:
    return Counter(zip(*(words[at:] for at in range(size))))


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _longest_common(ours: list[str], theirs: list[str]) -> int:
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = list(row)
        for at, other in enumerate(theirs, 1):
            row[at] = before[at - 1] + 1 if word == other else max(before[at], row[at - 1])
    return row[-1]


def test_rouge_and_squad_against_computations_of_their_own() -> None:
    """ROUGE from n-gram counts and a longest common subsequence; SQuAD F1 against torchmetrics' SQuAD."""
    from torchmetrics.functional.text import squad

    generator = random.Random(0)
    words = ["the", "cat", "dog", "a", "sat", "on", "mat", "red"]
    for _ in range(30):
        ours, theirs = ([generator.choice(words) for _ in range(generator.randint(2, 9))] for _ in range(2))
        text, reference = " ".join(ours), " ".join(theirs)
        for size in (1, 2):
            left, right = _grams(ours, size), _grams(theirs, size)
            expected = _f1((left & right).total(), left.total(), right.total())
            assert per_prompt(f"rouge{size}", [text], [reference])[0] == pytest.approx(expected)
        expected = _f1(_longest_common(ours, theirs), len(ours), len(theirs))
        assert per_prompt("rougeL", [text], [reference])[0] == pytest.approx(expected)
        judged = squad(
            [{"prediction_text": text, "id": "1"}],
            [{"answers": {"answer_start": [0], "text": [reference]}, "id": "1"}],
        )
        assert per_prompt("squad_f1", [text], [reference])[0] == pytest.approx(float(judged["f1"]) / 100)


def test_gsm8k_answers_of_the_data_set_match_themselves_and_seldom_another(gsm8k) -> None:
    with gzip.open(gsm8k / "test.jsonl.gz", "rt") as file:
        answers = [json.loads(line)["answer"] for line in file][:500]
    assert per_prompt("gsm8k", answers, answers).all()
    finals = [answer.rpartition("####")[2].strip().replace(",", "") for answer in answers]
    spoken = [f"So it must be ${final}." for final in finals]
    assert per_prompt("gsm8k", spoken, answers).all()
    shifted = per_prompt("gsm8k", answers[1:] + answers[:1], answers)
    expected = [float(a) == float(b) for a, b in zip(finals[1:] + finals[:1], finals)]
    assert list(shifted.astype(bool)) == expected


def test_pass_at_one_by_a_users_program() -> None:
    program = f"command:{sys.executable} -c 'import sys; sys.exit(\"42\" not in sys.stdin.read())'"
    assert list(per_prompt(program, ["it is 42", "no"], [None, None])) == [1.0, 0.0]
    same = f"command:{sys.executable} -c 'import os, sys; sys.exit(sys.stdin.read() != os.environ[\"REFERENCE\"])'"
    assert list(per_prompt(same, ["a", "b"], ["a", "c"])) == [1.0, 0.0]
    with pytest.raises(InputError, match="cannot be run"):
        per_prompt("command:/no/such/program", ["x"], [None])


def rows(rule: str, texts: list[str], emitted: int) -> list[dict]:
    return [
        {
            "id": f"p{i}",
            "rule": rule,
            "repetition": 0,
            "text": t,
            "reference": "a b c d",
            "counts": {"emitted": emitted},
        }
        for i, t in enumerate(texts)
    ]


def test_online_table_pairs_rules_on_the_same_prompts() -> None:
    good, bad = ["a b c d"] * 20, ["a b c d"] * 10 + ["x"] * 10
    outputs = rows("lossless", good, 4) + rows("opt:alpha=0.2", bad, 5)
    batches = [
        {"rule": rule, "repetition": r, "batch": b, "seconds": s * (1 + b)}
        for rule, s in (("verifier_only", 3.0), ("lossless", 2.0), ("opt:alpha=0.2", 1.0))
        for r in range(3)
        for b in range(12)
    ]
    table = online_table(outputs, batches)
    opt = table["opt:alpha=0.2"]
    assert opt["length_ratio"].value == 1.25
    assert opt["speed"].value == pytest.approx(3.0)
    assert opt["speed"].high == pytest.approx(3.0)
    assert opt["quality_difference"].value == pytest.approx(-0.5, abs=0.01)
    assert opt["quality_difference"].high < 0
    assert table["lossless"]["quality_difference"].value == 0
