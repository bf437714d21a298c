"""Quality of generated texts: per prompt in [0, 1] for certificates and intervals, per corpus for tables.

Corpus BLEU is no mean over prompts, so it has no per-prompt form here and cannot be certified.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import string
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deferral_train.errors import InputError
from deferral_train.evaluation import code, sql

REFERENCE = "REFERENCE"  # environment variable of a user's program
RIGHT = sql.RIGHT
_ANSWER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(text: str, reference: str) -> float:
    """1 where both are the same but for surrounding white space."""
    return float(text.strip() == reference.strip())


def chrf(text: str, reference: str) -> float:
    """Sentence chrF of sacrebleu (no word n-grams), divided by 100."""
    return _chrf().sentence_score(text, [reference]).score / 100


def chrf1(text: str, reference: str) -> float:
    """As :func:`chrf` with recall counted once (beta 1): chrF itself counts it twice and so rewards long texts."""
    return _chrf(1).sentence_score(text, [reference]).score / 100


def sentence_bleu(text: str, reference: str) -> float:
    """BLEU of one text by sacrebleu, effective order and exponential smoothing, divided by 100."""
    return _sentence_bleu().sentence_score(text, [reference]).score / 100


def squad_f1(text: str, reference: str) -> float:
    """Token F1 of the SQuAD evaluation: lower case, no punctuation or articles."""
    ours, theirs = _squad_words(text), _squad_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def gsm8k(text: str, reference: str) -> float:
    """1 where the final numbers agree: after ``####`` where it is there, else the last number of the text."""
    return float(_final_number(text) is not None and _final_number(text) == _final_number(reference))


def rouge(kind: str) -> Callable[[str, str], float]:
    """ROUGE F1 as torchmetrics computes it, ``kind`` one of rouge1, rouge2, rougeL."""

    def score(text: str, reference: str) -> float:
        from torchmetrics.functional.text import rouge_score

        return float(rouge_score(text, reference, rouge_keys=(kind,))[f"{kind}_fmeasure"])

    return score


# Metric -> score of one text against its reference, in [0, 1], more is better.
METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "chrf": chrf,
    "chrf1": chrf1,
    "sentence_bleu": sentence_bleu,
    "squad_f1": squad_f1,
    "gsm8k": gsm8k,
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
}


def per_prompt(metric: str, texts: Sequence[str], references: Sequence[str | None]) -> np.ndarray:
    """Score of each text [n] in [0, 1].

    Args:
        metric: a name in :data:`METRICS`; ``sql:DATABASE``, execution accuracy on a SQLite file (:mod:`sql`);
            ``python_tests``, pass@1 of Python programs (:mod:`code`); or ``command:PROGRAM ARGUMENTS``: the program
            gets the text on standard input and the reference, where there is one, in the environment variable
            ``REFERENCE``; it passes the text by exiting with 0 (pass@1).
        references: what the metric compares with, see :func:`gold`.

    Raises:
        InputError: an unknown metric, or texts without references.
    """
    check_metric(metric)
    if metric.startswith("command:"):
        program = metric.removeprefix("command:")
        return np.array([passes(program, text, reference) for text, reference in zip(texts, references)])
    refuse_without(metric, references)
    if judged(metric):
        return np.array([float(verdict == RIGHT) for verdict in verdicts(metric, texts, references)])
    return np.array([METRICS[metric](text, str(reference)) for text, reference in zip(texts, references)])


def judged(metric: str) -> bool:
    """True for a metric that runs a text and so has a verdict for each: ``sql:DATABASE`` and ``python_tests``."""
    return metric == code.METRIC or sql.database_of(metric) is not None


def verdicts(metric: str, texts: Sequence[str], references: Sequence[str | None]) -> list[str]:
    """``right`` for each text, or the reason why it is not, of a metric that is :func:`judged`."""
    database, golds = sql.database_of(metric), [str(reference) for reference in references]
    return code.judge_code(texts, golds) if database is None else sql.judge(database, texts, golds)


def gold(metric: str, row: Mapping[str, Any]) -> str | None:
    """The text that a metric compares a decoded row with: its tests for ``python_tests``, else its reference."""
    return row.get("tests" if metric == code.METRIC else "reference")


def refuse_without(metric: str, references: Sequence[str | None]) -> None:
    """Refuse a metric where prompts have nothing to compare with.

    Raises:
        InputError: names the metric and how many have none.
    """
    absent = sum(reference is None for reference in references)
    wanted = "tests (prompt_format mbpp reads them)" if metric == code.METRIC else "references"
    if absent and not metric.startswith("command:"):
        raise InputError(
            f"metric {metric} needs {wanted}, and {absent} of {len(references)} prompts have none"
        )


def check_metric(metric: str) -> None:
    """Refuse a metric that no prompt can be scored by, before any work is done for it.

    Raises:
        InputError: an unknown metric, a corpus score, a program or database that is not there, or code that nobody
            allowed to run.
    """
    if metric.startswith("command:"):
        check_program(metric.removeprefix("command:"))
    elif metric == code.METRIC:
        code.check_allowed()
    elif (database := sql.database_of(metric)) is not None:
        sql.check_database(database)
    elif metric == "bleu":
        raise InputError(
            "metric bleu is a corpus score, no mean over prompts; use sentence_bleu, chrf or exact_match"
        )
    elif metric not in METRICS:
        raise InputError(
            f"metric is {metric!r}; use one of {', '.join(METRICS)}, {code.METRIC}, 'sql:DATABASE' or "
            "'command:PROGRAM'"
        )


def check_program(command: str) -> None:
    """Raises InputError where there is no such program."""
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        raise InputError(f"metric command:{command} cannot be run: no such program; check its path")


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of sacrebleu, 0 to 100."""
    from sacrebleu.metrics import BLEU

    return BLEU().corpus_score(list(texts), [list(references)]).score


def passes(command: str, text: str, reference: str | None = None, timeout: float = 30.0) -> float:
    """1 where the user's program accepts the text; a program that takes too long rejects it."""
    given = {} if reference is None else {REFERENCE: reference}
    try:
        done = subprocess.run(
            shlex.split(command),
            input=text.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **given},
        )
    except subprocess.TimeoutExpired:
        return 0.0
    except OSError as error:
        raise InputError(
            f"metric command:{command} cannot be run ({error.strerror}); check the program"
        ) from error
    return float(done.returncode == 0)


@functools.cache
def _chrf(beta: int = 2):  # type: ignore[no-untyped-def]
    from sacrebleu.metrics import CHRF

    return CHRF(beta=beta)


@functools.cache
def _sentence_bleu():  # type: ignore[no-untyped-def]
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True, smooth_method="exp")


def _squad_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", kept).split()


def _final_number(text: str) -> float | None:
    found = _ANSWER.findall(text) or _NUMBER.findall(text)
    try:
        return float(found[-1].replace(",", "").rstrip(".")) if found else None
    except ValueError:
        return None
