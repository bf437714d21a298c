"""Scorers of finished texts for labels: by the name of a metric, of a program, or of a Python function.

A scorer takes texts and references and gives scores [n] in [0, 1], NaN where it could not. A corpus metric is made one
of single texts at a corpus: what the corpus score would be with this text in it, times the number of texts.
"""

from __future__ import annotations

import importlib
import json
import math
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deferral_train.errors import InputError
from deferral_train.evaluation.quality import METRICS, check_program, per_prompt
from deferral_train.evaluation.sql import database_of

COMMAND = "command:"
PATIENCE = 30.0  # seconds that a program may take over one text


def make_scorer(metric: str, typed: Collection[str] = ()) -> Any:
    """The scorer that a name stands for.

    Args:
        metric: a name in :data:`~deferral_train.evaluation.quality.METRICS`, `CORPUS_METRICS`, ``sql:DATABASE``,
            ``command:PROGRAM``, or ``module:function``.
        typed: names that the user typed; a function is imported only where it is one of them.

    Raises:
        InputError: an unknown metric, a program or function that is not there.
    """
    if metric in METRICS or database_of(metric) is not None:
        return NamedScorer(metric)
    if metric in CORPUS_METRICS:
        return CorpusScorer(metric)
    if metric.startswith(COMMAND):
        return ProgramScorer(metric.removeprefix(COMMAND))
    module, colon, name = metric.partition(":")
    if colon and module and name:
        if metric not in typed:
            raise InputError(
                f"metric {metric}: a function is imported only where it was typed; give it as a flag"
            )
        return FunctionScorer(metric, _imported(metric, module, name))
    raise InputError(
        f"metric is {metric!r}; use one of {', '.join([*METRICS, *CORPUS_METRICS])}, 'sql:DATABASE', "
        "'command:PROGRAM' or 'module:function'"
    )


def make_scorers(metrics: Sequence[str]) -> dict[str, Any]:
    """Scorers of metrics that the user typed."""
    return {metric: make_scorer(metric, metrics) for metric in metrics}


@dataclass(frozen=True)
class NamedScorer:
    """A metric of :mod:`deferral_train.evaluation.quality`."""

    metric: str

    def __call__(self, texts: Sequence[str], references: Sequence[str | None]) -> np.ndarray:
        return per_prompt(self.metric, texts, references)


@dataclass(frozen=True)
class FunctionScorer:
    """A function (text, reference) -> score in [0, 1] of the user's own."""

    name: str
    function: Callable[[str, str | None], float]
    without_references = True

    def __call__(self, texts: Sequence[str], references: Sequence[str | None]) -> np.ndarray:
        return np.array([self._score(text, reference) for text, reference in zip(texts, references)])

    def _score(self, text: str, reference: str | None) -> float:
        try:
            value = float(self.function(text, reference))
        except Exception as error:  # whatever the user's own code raises
            told = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise InputError(
                f"metric {self.name} failed on a text of {len(text)} characters ({told})"
            ) from error
        return check_score(self.name, value)


def check_score(metric: str, value: float) -> float:
    """The score.

    Raises:
        InputError: it is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise InputError(f"metric {metric} gave {value:g}; a score must lie in [0, 1]")
    return value


def _imported(metric: str, module: str, name: str) -> Callable[[str, str | None], float]:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"metric {metric} cannot be imported ({error}); check module and function") from None
    if not callable(found):
        raise InputError(f"metric {metric} is no function")
    return found


@dataclass
class ProgramScorer:
    """A program that is started once and answers one line of JSON for each it reads.

    It reads ``{"text": ..., "reference": ...}`` and answers ``{"score": s}``. Answers are kept by text and reference.
    One that does not answer in time, or ends, gives no score and is started again.
    """

    command: str
    patience: float = PATIENCE
    without_references = True
    _known: dict[tuple[str, str | None], float] = field(default_factory=dict)
    _running: _Program | None = None

    def __post_init__(self) -> None:
        check_program(self.command)

    def __call__(self, texts: Sequence[str], references: Sequence[str | None]) -> np.ndarray:
        return np.array([self._score(text, reference) for text, reference in zip(texts, references)])

    def _score(self, text: str, reference: str | None) -> float:
        if (text, reference) not in self._known:
            self._known[text, reference] = self._ask(text, reference)
        return self._known[text, reference]

    def _ask(self, text: str, reference: str | None) -> float:
        if self._running is None:
            self._running = _Program(self.command)
        answer = self._running.ask(json.dumps({"text": text, "reference": reference}), self.patience)
        if answer is None:
            self.close()
            return math.nan
        try:
            value = json.loads(answer)["score"]
            number = isinstance(value, int | float) and not isinstance(value, bool)
        except (ValueError, KeyError, TypeError):
            number = False
        return check_score(COMMAND + self.command, float(value)) if number else math.nan

    def close(self) -> None:
        """End the program."""
        if self._running is not None:
            self._running.close()
            self._running = None


class _Program:
    """A child process, and a thread that reads its lines so that waiting for one can end."""

    def __init__(self, command: str) -> None:
        try:
            self.process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise InputError(
                f"metric command:{command} cannot be run ({error.strerror}); check the program"
            ) from error
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def ask(self, line: str, patience: float) -> str | None:
        """Its answer, None where there is none."""
        if not self.lines.empty():  # a line that nothing was asked for would pass for the next answer
            return None
        until = time.monotonic() + patience
        # A program that does not read lets a long line fill the pipe, and the write waits with it.
        writer = threading.Thread(target=self._write, args=(line + "\n",), daemon=True)
        writer.start()
        writer.join(patience)
        if writer.is_alive():
            return None
        try:
            return self.lines.get(timeout=max(0.0, until - time.monotonic())) or None
        except queue.Empty:
            return None

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except (OSError, ValueError):  # it has ended; that there is no answer tells
            return

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class CorpusScorer:
    """Corpus BLEU or chrF of sacrebleu, from the counts of its texts."""

    metric: str

    def at(self, texts: Sequence[str], references: Sequence[str | None]) -> BoundScorer:
        """Scores of single texts at this corpus."""
        own = CORPUS_METRICS[self.metric]()
        total = _counts(own, texts, references).sum(axis=0)
        return BoundScorer(self.metric, own, total, len(texts))

    def of_corpus(self, texts: Sequence[str], references: Sequence[str | None]) -> float:
        """The score of this corpus, in [0, 1]."""
        own = CORPUS_METRICS[self.metric]()
        return _corpus_score(own, _counts(own, texts, references).sum(axis=0))


@dataclass(frozen=True)
class BoundScorer:
    """n times the corpus score once this text takes an average text's place among n; differences are what counts.

    Attributes:
        total: counts of the corpus, [K].
        texts: n.
    """

    metric: str
    own: Any
    total: np.ndarray
    texts: int

    def __call__(self, texts: Sequence[str], references: Sequence[str | None]) -> np.ndarray:
        rest = self.total * (1 - 1 / self.texts)
        counts = _counts(self.own, texts, references)
        return np.array([self.texts * _corpus_score(self.own, rest + row) for row in counts])


def _counts(own: Any, texts: Sequence[str], references: Sequence[str | None]) -> np.ndarray:
    """sacrebleu's counts of every text, [n, K]; its own names for them are not public."""
    found = own._extract_corpus_statistics(list(texts), [[str(one) for one in references]])
    return np.array(found, dtype=float)


def _corpus_score(own: Any, counts: np.ndarray) -> float:
    return float(own._compute_score_from_stats(counts.tolist()).score) / 100


def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU()


def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


CORPUS_METRICS: dict[str, Callable[[], Any]] = {"corpus_bleu": _bleu, "corpus_chrf": _chrf}
