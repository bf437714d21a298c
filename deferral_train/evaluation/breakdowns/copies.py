"""How much a text copies from its prompt, and where Max-Gram's proposals fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import Redraws
from deferral_train.evaluation.breakdowns.prompts import Part
from deferral_train.evaluation.breakdowns.tables import Row

BINS = 4
MATCHES = ("no match", "matched 1 token", "matched 2 or more")
FAILURE, SHARE = "failure rate", "share of positions"


@dataclass(frozen=True)
class Text:
    """The logged text of one prompt.

    Attributes:
        part: number of the folder that it was logged in.
        prompt: id.
        tokens: in order.
    """

    part: int
    prompt: str
    tokens: list[int]


def logged_texts(parts: Sequence[Part]) -> list[Text]:
    """The texts of all folders, prompts in order of appearance."""
    texts = []
    for number, part in enumerate(parts):
        rows = part.traces.prompt_of_row
        tokens = part.traces.column("token").tolist()
        starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]).tolist()
        ids = part.traces.manifest.prompt_ids
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            texts.append(Text(number, ids[int(rows[start])], tokens[start:end]))
    return texts


def copy_rates(parts: Sequence[Part], texts: Sequence[Text]) -> np.ndarray:
    """Share of each text's tokens that occur in its prompt [U], special tokens of both left out; 0 without text."""
    rates = np.zeros(len(texts))
    for number, text in enumerate(texts):
        part = parts[text.part]
        prompt = set(_prompt(part, text.prompt)) - part.special
        own = [token for token in text.tokens if token not in part.special]
        rates[number] = sum(token in prompt for token in own) / len(own) if own else 0.0
    return rates


def quantile_bins(rates: np.ndarray, bins: int = BINS) -> list[str]:
    """The bin of each rate, named by its limits: equal counts as far as ties allow; sorted by the caller's rates."""
    edges = np.unique(np.quantile(rates, np.linspace(0, 1, bins + 1)))
    inner = edges[1:-1]
    numbers = np.searchsorted(inner, rates, side="right")
    names = [f"{low:.2f} to {high:.2f}" for low, high in zip([edges[0], *inner], [*inner, edges[-1]])]
    return [names[int(number)] for number in numbers]


@dataclass(frozen=True)
class MaxGramFailures:
    """Max-Gram asked for one token at every logged position, counted per prompt and kind of match.

    Attributes:
        asked: [U, 3] how often.
        failed: [U, 3] how often its proposal was another token, or none.
    """

    asked: np.ndarray
    failed: np.ndarray


def count_failures(parts: Sequence[Part], texts: Sequence[Text], settings: MaxGram) -> MaxGramFailures:
    """Propose, compare with the token that follows, read it, go on."""
    asked, failed = (np.zeros((len(texts), len(MATCHES))) for _ in range(2))
    for number, text in enumerate(texts):
        part = parts[text.part]
        reader = settings.read(_prompt(part, text.prompt), part.separate)
        for size, token in enumerate(text.tokens):
            proposal = reader.propose(1)
            kind = min(reader.match().length, 2)
            asked[number, kind] += 1
            failed[number, kind] += proposal != [token]
            reader.follow(size, [token])
    return MaxGramFailures(asked, failed)


def by_match(found: MaxGramFailures, redraws: Redraws) -> list[Row]:
    """A row per kind of match and one for all."""
    positions = found.asked.sum(1)
    kinds = [(name, found.asked[:, kind], found.failed[:, kind]) for kind, name in enumerate(MATCHES)]
    every = ("all positions", positions, found.failed.sum(1))
    rows = []
    for name, asked, failed in (*kinds, every):
        numbers = {SHARE: redraws.ratio(asked, positions), FAILURE: redraws.ratio(failed, asked)}
        rows.append(Row.of(name, None, asked, numbers))
    return rows


def by_class(found: MaxGramFailures, groups: Sequence[str], redraws: Redraws) -> list[Row]:
    """A row per group of prompts: failures, and how often each kind of match came up."""
    names, rows = np.array(groups, dtype=object), []
    for name in dict.fromkeys(groups):
        own = names == name
        asked, failed = found.asked[own], found.failed[own]
        positions = asked.sum(1)
        numbers = {FAILURE: redraws.ratio(failed.sum(1), positions)}
        numbers |= {kind: redraws.ratio(asked[:, k], positions) for k, kind in enumerate(MATCHES)}
        rows.append(Row.of(name, None, positions, numbers))
    return rows


def _prompt(part: Part, prompt: str) -> list[int]:
    if part.prompt_ids is None:
        raise InputError(
            f"the traces {part.name} hold no prompts; give prompts, the file that they were collected from, and "
            "tokenizer, a checkpoint of their pair"
        )
    return part.prompt_ids[prompt]
