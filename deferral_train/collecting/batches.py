"""Turns a batch of prompts into trace rows: both models' passes, measured on their device, in a fixed order.

N scored positions of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deferral_train.collecting.judging import judge_columns
from deferral_train.collecting.measure import Measure
from deferral_train.collecting.prefixes import Continuations, PrefixSource
from deferral_train.collecting.scoring import ModelOutputs, make_inputs, score
from deferral_train.collecting.sequence_labels import SequenceLabels
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.load import ModelPair
from deferral_train.rules import risks
from deferral_train.traces import Chunk, Manifest

TEACHER_ROWS = 256  # positions per block of the teacher's distribution


@dataclass(frozen=True)
class TraceRows:
    """Trace rows of one batch.

    Attributes:
        columns: every column of the layout, [N] or [N, K].
        finite: [N], False where the row means nothing.
        suspects: by model, [N] bool: its logits were NaN or infinite there; empty where all is well.
    """

    columns: dict[str, Tensor]
    finite: Tensor
    suspects: dict[str, Tensor]


@dataclass(frozen=True)
class Scored:
    """A batch as the models left it.

    Attributes:
        numbers: prompt numbers.
        continuations: what was scored.
        scores: logits and hidden states by role.
        rows: [N], places of the scored positions among the logit rows.
        labels: columns of judge labels, empty for none.
    """

    numbers: Sequence[int]
    continuations: Continuations
    scores: dict[str, ModelOutputs]
    rows: Tensor
    labels: dict[str, Tensor]


class BatchCollector:
    """Collects one batch: continue the prompts, score them with both models, measure.

    Args:
        pair: the models, each on its own device; the rest of the work is done on the verifier's.
        teacher: a third model for the truth group, or None.
        source: where prefixes come from.
        manifest: says what is logged.
        prompts: by number.
        sequence: makes sequence labels, where the manifest asks for them.
    """

    def __init__(
        self,
        pair: ModelPair,
        teacher: Any | None,
        source: PrefixSource,
        manifest: Manifest,
        prompts: Sequence[EncodedPrompt],
        sequence: SequenceLabels | None = None,
    ) -> None:
        self.pair, self.teacher, self.source, self.sequence = pair, teacher, source, sequence
        self.manifest, self.prompts = manifest, prompts
        self.measure = Measure(pair.vocab_size, manifest.top_k, manifest.temperature)

    def __call__(self, chunk: Chunk, batch: int) -> TraceRows:
        """Trace rows of the chunk's batch with this number."""
        return self.rows(self.score(chunk, batch))

    def score(self, chunk: Chunk, batch: int) -> Scored:
        """The models' part: prefixes and logits."""
        numbers = chunk.batches[batch]
        return self.follow(numbers, self.continuations(numbers, (chunk.seed + batch) % 2**32))

    def continuations(self, numbers: Sequence[int], seed: int) -> Continuations:
        """The path of these prompts."""
        return self.source(self.pair, [self.prompts[number] for number in numbers], seed)

    def follow(self, numbers: Sequence[int], continuations: Continuations) -> Scored:
        """Both models' passes along a path, and labels."""
        prompts = [self.prompts[number] for number in numbers]
        scores, rows = self._score(prompts, continuations)
        labels = self._labels(prompts, continuations, scores, rows)
        scores = {
            role: ModelOutputs(one.logits, one.hidden) for role, one in scores.items()
        }  # the cache may go
        return Scored(numbers, continuations, scores, rows, labels)

    def rows(self, scored: Scored) -> TraceRows:
        """The rest: from logits to columns. Touches no model, so that another thread may do it."""
        scores, rows = scored.scores, scored.rows
        tokens = [token for row in scored.continuations.tokens for token in row]
        token = torch.tensor(tokens, device=rows.device)
        columns = self.measure(scores["drafter"].logits, scores["verifier"].logits, rows, token)
        finite = columns.pop("finite")
        suspects = {} if bool(finite.all()) else self._suspects(scores, rows)
        columns |= self._context(scored.numbers, scored.continuations, token)
        columns |= {
            f"{role}_hidden": s.hidden
            for role, s in scores.items()
            if s.hidden is not None and role in self.manifest.hidden
        }
        columns |= scored.labels
        if self.teacher is not None:
            columns |= self._truth(scores, rows)
        return TraceRows(columns, finite, suspects)

    def _score(
        self, prompts: Sequence[EncodedPrompt], continuations: Continuations
    ) -> tuple[dict[str, ModelOutputs], Tensor]:
        """Outputs by role; the scored places are the same for all, because the tokens are."""
        models = {"drafter": self.pair.drafter, "verifier": self.pair.verifier}
        if self.teacher is not None:
            models["teacher"] = self.teacher
        ids = [prompt.input_ids for prompt in prompts]
        device = self.pair.device
        scores = {}
        for role, model in models.items():
            inputs = make_inputs(model, ids, continuations.tokens, model.device)
            again = role == "verifier" and self._runs_again
            found = score(model, inputs, again or role in self.manifest.hidden, keep_past=again)
            hidden = None if found.hidden is None else found.hidden.to(device)
            scores[role] = ModelOutputs(found.logits.to(device), hidden, found.past)
        return scores, inputs.rows.to(device)

    @property
    def _runs_again(self) -> bool:
        """True where labels have the verifier start from its cache once more."""
        served = self.sequence is not None and self.sequence.engine is not None
        return bool(self.manifest.labels) and not served

    def _labels(
        self,
        prompts: Sequence[EncodedPrompt],
        continuations: Continuations,
        scores: dict[str, ModelOutputs],
        rows: Tensor,
    ) -> dict[str, Tensor]:
        """Columns of labels, which need the verifier once more."""
        if not self.manifest.labels:
            return {}
        if self.sequence is not None:
            return self.sequence.columns(prompts, continuations, scores, rows)
        distributions = {
            role: scores[role].logits[:, : self.pair.vocab_size].index_select(0, rows)
            for role in ("drafter", "verifier")
        }
        return judge_columns(
            self.pair.verifier,
            distributions["drafter"],
            distributions["verifier"],
            scores["verifier"],
            continuations,
            [prompt.input_ids for prompt in prompts],
            int(self.manifest.labels.get("window", 0)),
            int(self.manifest.chunking["batch_tokens"]),
        )

    def _suspects(self, scores: dict[str, ModelOutputs], rows: Tensor) -> dict[str, Tensor]:
        known = self.pair.vocab_size
        return {
            role: ~torch.isfinite(one.logits[:, :known].index_select(0, rows)).all(dim=1)
            for role, one in scores.items()
        }

    def _context(
        self, numbers: Sequence[int], continuations: Continuations, token: Tensor
    ) -> dict[str, Tensor]:
        """Prompt number, position, gold; for cascades the origin and the place in the block."""
        lengths = [len(row) for row in continuations.tokens]
        device = token.device
        count = torch.tensor(lengths, device=device)
        context = {
            "prompt": torch.tensor(numbers, device=device).repeat_interleave(count),
            "position": torch.cat([torch.arange(length, device=device) for length in lengths]),
            "gold": token if continuations.gold else torch.full_like(token, -1),
        }
        if continuations.origin is not None and continuations.draft_position is not None:
            flat = {"origin": continuations.origin, "draft_position": continuations.draft_position}
            context |= {
                name: torch.tensor([value for row in rows for value in row], device=device)
                for name, rows in flat.items()
            }
        return context

    def _truth(self, scores: dict[str, ModelOutputs], rows: Tensor) -> dict[str, Tensor]:
        """The truth group under P := the teacher's distribution."""
        parts = [self._truth_block(scores, block) for block in rows.split(TEACHER_ROWS)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _truth_block(self, scores: dict[str, ModelOutputs], rows: Tensor) -> dict[str, Tensor]:
        distributions = {
            role: one.logits[:, : self.pair.vocab_size].index_select(0, rows).float().softmax(dim=-1)
            for role, one in scores.items()
        }
        return truth_columns(distributions["drafter"], distributions["verifier"], distributions["teacher"])


def truth_columns(q: Tensor, p: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """The truth group for a known distribution P, from distributions [N, V]."""
    columns = {}
    for role, distribution in (("drafter", q), ("verifier", p)):
        columns[f"truth_{role}_argmax"] = 1 - risks.expected_loss("zero_one", distribution, truth)
        columns[f"truth_{role}_log"] = risks.expected_loss("log", distribution, truth)
        columns[f"truth_{role}_prob"] = 1 - risks.expected_loss("prob", distribution, truth)
    return columns
