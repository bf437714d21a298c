"""Checks that a pair is worth hours of work: the verifier clearly better, its pass clearly dearer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import ModelPair
from deferral_train.pairs.padding import IGNORED, answered, next_token_logits, pad
from deferral_train.pairs.passes import pass_seconds
from deferral_train.pairs.prompts import Prompt

BATCH = 8  # sequences scored at once
EVERY = 5.0  # seconds between two lines about progress


@dataclass(frozen=True)
class GateResult:
    """Held-out quality and cost of a pair.

    Attributes:
        drafter_nats, verifier_nats: mean negative log-likelihood, nats a token, on the same ``tokens``
            tokens.
        mean_tv: mean total variation between the two distributions there; 1 - mean_tv is what rejection sampling
            accepts.
        agreement: share of tokens at which both have the same most probable token.
        drafter_seconds, verifier_seconds: median time of one cached pass over one token (``passes.pass_seconds``).
    """

    drafter_nats: float
    verifier_nats: float
    mean_tv: float
    agreement: float
    tokens: int
    drafter_seconds: float
    verifier_seconds: float

    @property
    def advantage(self) -> float:
        """Nats a token by which the verifier is better."""
        return self.drafter_nats - self.verifier_nats

    @property
    def cost_ratio(self) -> float:
        """The verifier's pass in passes of the drafter."""
        return self.verifier_seconds / self.drafter_seconds

    def reasons(self, min_nats: float = 0.2, min_cost_ratio: float = 3.0) -> list[str]:
        """Reasons against the pair, in words; empty where it passes."""
        found = []
        if not self.advantage >= min_nats:
            found.append(
                f"the verifier is better by {self.advantage:.3f} nats a held-out token, needs {min_nats}"
            )
        if not self.cost_ratio >= min_cost_ratio:
            found.append(f"its pass costs {self.cost_ratio:.2f} times the drafter's, needs {min_cost_ratio}")
        return found

    def require(self, min_nats: float = 0.2, min_cost_ratio: float = 3.0) -> None:
        """Raise one line of :class:`InputError` unless the pair passes."""
        found = self.reasons(min_nats, min_cost_ratio)
        if found:
            remedy = "use a larger verifier or a smaller drafter, or train longer"
            raise InputError(f"pair: {'; '.join(found)}; {remedy}")


def check_pair(
    pair: ModelPair,
    texts: Sequence[Prompt],
    *,
    context: int = 128,
    max_tokens: int = 20_000,
    min_cost_ratio: float = 3.0,
    tries: int = 3,
    say: Callable[[str], None] | None = None,
) -> GateResult:
    """Score held-out texts under both models and time their passes.

    Args:
        pair: the models.
        texts: held-out texts (prompt followed by reference; encoder-decoder: reference given prompt).
        context: tokens that are scored together.
        max_tokens: stop scoring after about this many.
        min_cost_ratio: a measured ratio below it is measured again, since other work on the machine
            disturbs it.
        tries: most measurements; the fastest time of each model counts, which other work disturbs least.
        say: told in a line now and then how far this is; large models take minutes.

    Raises:
        InputError: no token to score in ``texts``.
    """
    tell = say or (lambda _: None)
    quality = _score(pair, texts, context, max_tokens, tell)
    drafter = verifier = math.inf
    for attempt in range(tries):
        tell(f"gate: timing the passes of both models, measurement {attempt + 1} of at most {tries}")
        times = pass_seconds(pair, texts)[1]
        drafter, verifier = min(drafter, times[0]), min(verifier, times[1])
        if verifier >= min_cost_ratio * drafter:
            break
    return GateResult(**quality, drafter_seconds=drafter, verifier_seconds=verifier)


@torch.inference_mode()
def _score(
    pair: ModelPair, texts: Sequence[Prompt], context: int, max_tokens: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    said = time.monotonic()
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for batch in _batches(pair, texts, context):
        wanted = batch["labels"] != IGNORED
        drafter, verifier = (
            _logprobs(model, batch, wanted, pair.vocab_size).to(pair.device)
            for model in (pair.drafter, pair.verifier)
        )
        labels = batch["labels"][wanted].to(pair.device)
        sums += torch.stack(
            [
                F.nll_loss(drafter, labels, reduction="sum"),
                F.nll_loss(verifier, labels, reduction="sum"),
                (drafter.exp() - verifier.exp()).abs().sum() / 2,
                (drafter.argmax(-1) == verifier.argmax(-1)).sum(),
            ]
        ).cpu()
        tokens += len(labels)
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            tell(f"gate: {tokens} tokens scored, at most {max_tokens}")
        if tokens >= max_tokens:
            break
    if not tokens:
        raise InputError(
            "held-out text: no token to score; give longer texts (with references for a T5 pair)"
        )
    names = ("drafter_nats", "verifier_nats", "mean_tv", "agreement")
    return {**{name: float(value) / tokens for name, value in zip(names, sums)}, "tokens": tokens}


def _logprobs(model: Any, batch: Mapping[str, Tensor], wanted: Tensor, vocab_size: int) -> Tensor:
    """Log-probabilities [N, V] of the wanted places, on the model's device."""
    here = {name: value.to(model.device) for name, value in batch.items()}
    return next_token_logits(model, here)[wanted.to(model.device)][:, :vocab_size].float().log_softmax(-1)


def _batches(pair: ModelPair, texts: Sequence[Prompt], context: int) -> Iterator[Mapping[str, Tensor]]:
    """Padded batches in the order of the texts, which take turns window by window so that all are heard."""
    if pair.is_encoder_decoder:
        rows = _pairs(pair, texts, context)
    elif getattr(pair.tokenizer, "chat_template", None) and any(text.reference for text in texts):
        rows = _answers(pair, texts, context)
    else:
        rows = _windows(pair, texts, context)
    for start in range(0, len(rows), BATCH):
        inputs, labels = zip(*rows[start : start + BATCH])
        mask = pad([[1] * len(row) for row in inputs], 0)
        yield {"input_ids": pad(inputs, 0), "attention_mask": mask, "labels": pad(labels, IGNORED)}


def _pairs(pair: ModelPair, texts: Sequence[Prompt], context: int) -> list[tuple[list[int], list[int]]]:
    encoded = (
        (_ids(pair, text.prompt)[:context], _ids(pair, text.reference or "")[:context])
        for text in texts
        if text.reference
    )
    return [(source, target) for source, target in encoded if source and target]


def _answers(pair: ModelPair, texts: Sequence[Prompt], context: int) -> list[tuple[list[int], list[int]]]:
    """References as answers in the pair's own chat template, as decoding asks for them; the prompt is not scored."""
    encoded = encode_prompts(pair.tokenizer, texts, require_reference=True, max_reference_tokens=context)
    return [answered(row.input_ids, row.reference_ids) for row in encoded.kept if row.input_ids]


def _windows(pair: ModelPair, texts: Sequence[Prompt], context: int) -> list[tuple[list[int], list[int]]]:
    turns: list[tuple[int, tuple[list[int], list[int]]]] = []
    for text in texts:
        ids = _ids(pair, text.prompt + (text.reference or ""))
        for number, at in enumerate(range(0, len(ids) - 1, context)):
            window = ids[at : at + context + 1]
            turns.append((number, (window[:-1], window[1:])))
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])]


def _ids(pair: ModelPair, text: str) -> list[int]:
    return list(pair.tokenizer(text, verbose=False)["input_ids"])
