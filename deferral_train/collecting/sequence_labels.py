"""Sequence labels of a batch as trace columns: draw places, finish both texts, score them, write gap and error.

N scored positions of a batch, n labelled places, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.collecting.continuations import CachedTexts, Tally, Verifier
from deferral_train.collecting.prefixes import Continuations
from deferral_train.collecting.scoring import ModelOutputs
from deferral_train.collecting.sequence import (
    Argmaxes,
    Place,
    Score,
    differing,
    draw_places,
    finished_places,
    gaps,
    prompt_seed,
)
from deferral_train.collecting.sequence_sampling import LabelSampling, Uniforms, draw_tokens, sampled_places
from deferral_train.errors import InputError
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.load import ModelPair
from deferral_train.rules.distributions import lowest_argmax
from deferral_train.traces.schema import (
    SEQUENCE_ERROR,
    SEQUENCE_GAP,
    SEQUENCE_GAPS,
    SEQUENCE_LOGPROBS,
    SEQUENCE_TOKEN,
    SEQUENCE_WORDS,
)

MOST_UNSCORED = 0.05  # share of finished texts that a scorer may fail on
FEWEST_SCORED = 40  # before that, a share says little


@dataclass(frozen=True)
class LabelSettings:
    """Settings that decide sequence labels.

    Attributes:
        metrics: names, in the order of the columns.
        scales: what each metric's gap is divided by before they are averaged.
        share: of the places of each prompt that are labelled.
        sampling: temperature, samples and form; temperature 0 needs no draws.
        reference: ``given``, or ``verifier``: its own finished text.
        seed: of places and draws.
        max_new_tokens: most tokens of a text.
    """

    metrics: tuple[str, ...]
    scales: tuple[float, ...]
    share: float
    sampling: LabelSampling
    reference: str
    seed: int
    max_new_tokens: int


@dataclass
class Unscored:
    """How many texts a scorer had to give a score for, and how many it failed on."""

    asked: int = 0
    failed: int = 0

    def add(self, values: np.ndarray) -> None:
        """Count a batch's scores [n, M].

        Raises:
            InputError: more than `MOST_UNSCORED` of them are missing.
        """
        self.asked += values.size
        self.failed += int(np.isnan(values).sum())
        if self.asked >= FEWEST_SCORED:
            self.check()

    def check(self) -> None:
        """As at the end, whatever was asked.

        Raises:
            InputError: as :meth:`add`.
        """
        if self.failed > MOST_UNSCORED * self.asked:
            raise InputError(
                f"label_metric: {self.failed} of {self.asked} gaps have no score, more than {MOST_UNSCORED:.0%}; "
                "run the scorer on one of the texts to see why it fails"
            )


@dataclass
class SequenceLabels:
    """Makes the columns of a batch.

    Args:
        pair: its verifier finishes the texts.
        settings: what to label, and how.
        scores: metric to scorer, for every metric of the settings.
        references: prompt id to reference; None where there is none.
    """

    pair: ModelPair
    settings: LabelSettings
    scores: Mapping[str, Score]
    references: Mapping[str, str | None]
    unscored: Unscored = field(default_factory=Unscored)
    tally: Tally = field(default_factory=Tally)

    def with_scales(self, scales: Sequence[float], scores: Mapping[str, Score]) -> SequenceLabels:
        """The same with scales, and with scorers that know their corpus."""
        return SequenceLabels(
            self.pair, replace(self.settings, scales=tuple(scales)), scores, self.references
        )

    def columns(
        self,
        prompts: Sequence[EncodedPrompt],
        continuations: Continuations,
        scores: Mapping[str, ModelOutputs],
        rows: Tensor,
    ) -> dict[str, Tensor]:
        """Columns of a batch's positions, [N] and [N, M]; NaN (token -1) where not labelled.

        Args:
            prompts: of the batch.
            continuations: the path.
            scores: of both models over it, the verifier's with its cache.
            rows: places of the positions among the logit rows.
        """
        lengths = [len(tokens) for tokens in continuations.tokens]
        distributions = {
            role: scores[role].logits[:, : self.pair.vocab_size].index_select(0, rows).split(lengths)
            for role in ("drafter", "verifier")
        }
        past = scores["verifier"].past
        assert past is not None
        starts = [1 if self.pair.is_encoder_decoder else len(prompt.input_ids) for prompt in prompts]
        path = CachedTexts(continuations.tokens, starts, past)
        texts = self._places(prompts, path, distributions)
        columns = self._table(lengths, *self._measured(prompts, texts), str(rows.device))
        if self.settings.sampling.form == "token":
            columns |= _token_logprobs(columns[SEQUENCE_TOKEN], distributions)
        return columns

    def _places(
        self,
        prompts: Sequence[EncodedPrompt],
        path: CachedTexts,
        distributions: Mapping[str, Sequence[Tensor]],
    ) -> tuple[list[list[Place]], list[int], list[str | None]]:
        """Of every labelled place its samples, the token that it is about, and every prompt's reference."""
        settings, pair = self.settings, self.pair
        most = settings.max_new_tokens
        verifier = Verifier(pair.verifier, pair.vocab_size, frozenset(pair.eos_ids), most, tally=self.tally)
        argmaxes = [
            Argmaxes(lowest_argmax(q).tolist(), lowest_argmax(p).tolist())
            for q, p in zip(distributions["drafter"], distributions["verifier"])
        ]
        greedy = settings.sampling.temperature == 0
        chosen = [
            draw_places(
                differing(own) if greedy else range(len(text)),
                settings.share,
                prompt_seed(settings.seed, prompt.id, "places"),
            )
            for prompt, own, text in zip(prompts, argmaxes, path.texts)
        ]
        references: list[str | None] = [self.references.get(prompt.id) for prompt in prompts]
        own_wanted = settings.reference == "verifier"
        if greedy or own_wanted:
            picked = chosen if greedy else [[] for _ in chosen]
            found, own_texts = finished_places(verifier, path, argmaxes, picked, own_wanted)
            if own_wanted:
                references = list(map(self._text, own_texts))
        if greedy:
            tokens = [argmaxes[one.row].drafter[one.place] for one in found]
            return [[one] for one in found], tokens, references
        uniforms = Uniforms([prompt.id for prompt in prompts], settings.seed, most)
        sampled = {
            role: [(own.float() / settings.sampling.temperature).softmax(-1).cpu() for own in of_role]
            for role, of_role in distributions.items()
        }
        draws = draw_tokens(sampled, chosen, settings.sampling, uniforms)
        about = [one.drafted[0] if settings.sampling.form == "token" else -1 for one in draws]
        return sampled_places(verifier, path, draws, settings.sampling, uniforms), about, references

    def _measured(
        self,
        prompts: Sequence[EncodedPrompt],
        texts: tuple[list[list[Place]], list[int], list[str | None]],
    ) -> tuple[list[tuple[int, int]], list[int], np.ndarray, np.ndarray]:
        """(row, place) and token of every label, gaps [n, L, M] and words [n, L] over L samples."""
        places, tokens, references = texts
        flat = [one for samples in places for one in samples]
        scores = {name: self.scores[name] for name in self.settings.metrics}
        table, words = gaps(flat, self._text, scores, references)
        self.unscored.add(table)
        count = len(places)
        samples = max(1, self.settings.sampling.samples if self.settings.sampling.temperature else 1)
        where = [(samples_of[0].row, samples_of[0].place) for samples_of in places]
        return where, tokens, table.reshape(count, samples, len(scores)), words.reshape(count, samples)

    def _table(
        self,
        lengths: Sequence[int],
        where: Sequence[tuple[int, int]],
        tokens: Sequence[int],
        table: np.ndarray,
        words: np.ndarray,
        device: str,
    ) -> dict[str, Tensor]:
        scaled = (table / np.array(self.settings.scales)).mean(-1)  # [n, L]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = torch.tensor([int(offsets[row]) + place for row, place in where], dtype=torch.long)
        values: dict[str, Any] = {
            SEQUENCE_GAP: scaled.mean(1),
            SEQUENCE_ERROR: self._errors(scaled),
            SEQUENCE_WORDS: words.mean(1),
            SEQUENCE_GAPS: table.mean(1),
        }
        columns = {}
        for name, value in values.items():
            column = torch.full((int(offsets[-1]), *value.shape[1:]), torch.nan)
            column[index] = torch.from_numpy(np.asarray(value, dtype=np.float32))
            columns[name] = column.to(device)
        token = torch.full((int(offsets[-1]),), -1, dtype=torch.int64)
        token[index] = torch.tensor(tokens, dtype=torch.int64)
        return columns | {SEQUENCE_TOKEN: token.to(device)}

    def _errors(self, scaled: np.ndarray) -> np.ndarray:
        """Standard error over samples [n]: 0 at temperature 0, NaN where one sample cannot tell."""
        if self.settings.sampling.temperature == 0:
            return np.where(np.isnan(scaled[:, 0]), np.nan, 0.0)
        samples = scaled.shape[1]
        if samples < 2:
            return np.full(len(scaled), np.nan)
        return scaled.std(axis=1, ddof=1) / np.sqrt(samples)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.pair.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _token_logprobs(token: Tensor, distributions: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """log q and log p [N] of the labelled tokens, NaN where there is none."""
    found = {}
    for name, logits in zip(SEQUENCE_LOGPROBS, (distributions["drafter"], distributions["verifier"])):
        logprobs = torch.cat(list(logits)).float().log_softmax(-1)
        own = logprobs.gather(-1, token.clamp_min(0).to(logprobs.device).unsqueeze(-1))[:, 0]
        found[name] = torch.where(token.to(own.device) >= 0, own, torch.nan)
    return found
