"""Where the tokens come from that both models are scored on: references, either model, or a cascade.

A prefix source turns a batch of prompts into continuations. On-policy ones sample with the chunk's seed, so
that the same batch gives the same tokens on the same machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deferral_train.collecting.config import CollectConfig
from deferral_train.collecting.scoring import decoder_start
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.load import ModelPair
from deferral_train.rules.verify import Origin


@dataclass(frozen=True)
class Continuations:
    """The tokens that follow each prompt of a batch, and where they came from.

    Attributes:
        tokens: token ids, at least one per prompt.
        gold: whether the tokens are gold.
        origin: how each token came about (an ``Origin``), for cascades.
        draft_position: 0-based place in its drafted block, for cascades.
        labels: verdict on each token where it was judged: 1 acceptable, -1 important, 0 not judged.
    """

    tokens: list[list[int]]
    gold: bool
    origin: list[list[int]] | None = None
    draft_position: list[list[int]] | None = None
    labels: list[list[int]] | None = None


class PrefixSource(Protocol):
    def __call__(self, pair: ModelPair, prompts: Sequence[EncodedPrompt], seed: int) -> Continuations: ...


def make_source(config: CollectConfig) -> PrefixSource:
    """The source that a configuration asks for, but for ``labels="autojudge"``, which mines its own texts."""
    if config.prefixes == "reference":
        return from_references
    assert config.new_tokens is not None
    if config.prefixes == "cascade":
        assert config.rule is not None
        return FromCascade(
            config.rule, config.temperature, config.new_tokens, config.num_draft_tokens, config.blocks
        )
    return FromModel(config.prefixes, config.temperature, config.new_tokens)


def from_references(pair: ModelPair, prompts: Sequence[EncodedPrompt], seed: int) -> Continuations:
    """Teacher forcing: the reference's own tokens."""
    return Continuations([prompt.reference_ids for prompt in prompts], gold=True)


@dataclass(frozen=True)
class FromModel:
    """Text of the drafter or the verifier itself."""

    role: str
    temperature: float
    max_new_tokens: int

    def __call__(self, pair: ModelPair, prompts: Sequence[EncodedPrompt], seed: int) -> Continuations:
        model = getattr(pair, self.role)
        inputs = _prompt_inputs(pair, prompts, model.device)
        settings = _settings(pair, model, self.temperature, self.max_new_tokens)
        with _only(model, settings), _seeded(model.device, seed):
            ids = model.generate(**inputs, generation_config=settings, logits_processor=_known_tokens(pair))
        return Continuations(_new_tokens(pair, ids, _prompt_width(pair, inputs)), gold=False)


@dataclass(frozen=True)
class FromCascade:
    """Text of a speculative cascade: what a head will see when it is served by this rule."""

    rule: str
    temperature: float
    max_new_tokens: int
    num_draft_tokens: int
    blocks: str

    def __call__(self, pair: ModelPair, prompts: Sequence[EncodedPrompt], seed: int) -> Continuations:
        from deferral_train.decoding import cascade_generate
        from deferral_train.heads.rules import rule_from_spec

        model = pair.verifier
        inputs = _prompt_inputs(pair, prompts, model.device)
        settings = _settings(pair, model, self.temperature, self.max_new_tokens)
        settings.return_dict_in_generate = True
        with _only(model, settings):
            result = model.generate(
                **inputs,
                generation_config=settings,
                custom_generate=cascade_generate,
                drafter=pair.drafter,
                rule=rule_from_spec(self.rule, typed=[self.rule]),
                num_draft_tokens=self.num_draft_tokens,
                blocks=self.blocks,
                vocab_size=pair.vocab_size,
                generator=torch.Generator(device=model.device).manual_seed(seed),
            )
        tokens = _new_tokens(pair, result.sequences, _prompt_width(pair, inputs))
        origin = [row[: len(own)] for row, own in zip(result.stats.origin.tolist(), tokens)]
        return Continuations(tokens, False, origin, [draft_positions(row) for row in origin])


def greedy_continuations(
    pair: ModelPair, prompts: Sequence[EncodedPrompt], begun: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """The verifier's greedy text after each prompt and the tokens ``begun`` behind it, these included.

    Speculative with the pair's drafter under lossless verification, which changes nothing but the time.
    """
    from deferral_train.decoding import cascade_generate

    texts = [list(tokens) for tokens in begun]
    open_ = [
        number
        for number, tokens in enumerate(texts)
        if len(tokens) < max_new_tokens and tokens[-1] not in pair.eos_ids
    ]
    if not open_:
        return texts
    model = pair.verifier
    behind = [texts[number] for number in open_]
    if pair.is_encoder_decoder:
        inputs = _prompt_inputs(pair, [prompts[number] for number in open_], model.device)
        ids, mask = _left_padded([[decoder_start(model), *tokens] for tokens in behind], 0)
        inputs |= {"decoder_input_ids": ids.to(model.device), "decoder_attention_mask": mask.to(model.device)}
    else:
        rows = [[*prompts[number].input_ids, *tokens] for number, tokens in zip(open_, behind)]
        ids, mask = _left_padded(rows, pair.tokenizer.pad_token_id or 0)
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    longest = max_new_tokens - min(map(len, behind))
    settings = _settings(pair, model, 0.0, longest)
    with _only(model, settings):
        ids = model.generate(
            **inputs,
            generation_config=settings,
            custom_generate=cascade_generate,
            drafter=pair.drafter,
            rule="lossless",
            vocab_size=pair.vocab_size,
        )
    for number, tokens in zip(open_, _new_tokens(pair, ids, mask.shape[1])):
        texts[number] = [*texts[number], *tokens][:max_new_tokens]
    return texts


def _left_padded(rows: Sequence[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[fill] * gap + row for row, gap in zip(rows, gaps)]
    mask = [[0] * gap + [1] * len(row) for row, gap in zip(rows, gaps)]
    return torch.tensor(ids), torch.tensor(mask)


def draft_positions(origin: Sequence[int]) -> list[int]:
    """Each token's 0-based place in its block; a block ends with the verifier's own token."""
    places, place = [], 0
    for value in origin:
        places.append(place)
        place = 0 if value in (Origin.RESAMPLED, Origin.BONUS) else place + 1
    return places


def _prompt_inputs(
    pair: ModelPair, prompts: Sequence[EncodedPrompt], device: torch.device
) -> dict[str, Tensor]:
    """Left-padded for decoder-only models, right-padded for encoders."""
    rows = [prompt.input_ids for prompt in prompts]
    fill = pair.tokenizer.pad_token_id or 0
    if pair.is_encoder_decoder:
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        ids = torch.tensor([row + [fill] * gap for row, gap in zip(rows, gaps)])
        mask = torch.tensor([[1] * len(row) + [0] * gap for row, gap in zip(rows, gaps)])
    else:
        ids, mask = _left_padded(rows, fill)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _prompt_width(pair: ModelPair, inputs: dict[str, Tensor]) -> int:
    return 1 if pair.is_encoder_decoder else inputs["input_ids"].shape[1]


def _settings(pair: ModelPair, model: Any, temperature: float, max_new_tokens: int) -> Any:
    """Plain sampling or greedy decoding."""
    from transformers import GenerationConfig

    sampled = temperature > 0
    return GenerationConfig(
        do_sample=sampled,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(pair.eos_ids) or None,
        pad_token_id=pair.tokenizer.pad_token_id or 0,
        decoder_start_token_id=decoder_start(model) if pair.is_encoder_decoder else None,
        **({"temperature": float(temperature), "top_k": 0, "top_p": 1.0} if sampled else {}),
    )


@contextlib.contextmanager
def _only(model: Any, settings: Any) -> Iterator[None]:
    """Hide a checkpoint's own generation settings (top-k 50, penalties), which transformers would mix in.

    The prefixes would follow another distribution than the one that the manifest names.
    """
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _known_tokens(pair: ModelPair) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList([_OnlyKnownTokens(pair.vocab_size)])


class _OnlyKnownTokens:
    """Never emits a padding column of a model's vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.shape[-1] > self.vocab_size:
            scores = scores.clone()
            scores[:, self.vocab_size :] = -float("inf")
        return scores


def _new_tokens(pair: ModelPair, sequences: Tensor, start: int) -> list[list[int]]:
    """Tokens after the prompt, up to and with the first end of sequence."""
    rows = []
    for row in sequences[:, start:].tolist():
        ends = [place for place, token in enumerate(row) if token in pair.eos_ids]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's own generators of the CPU and of ``device``, seeded within; afterwards they go on as before."""
    own = device.type not in ("cpu", "mps")  # MPS has one generator, whose state is not kept by device
    forked = {"devices": [device.index or 0], "device_type": device.type} if own else {"devices": []}
    with torch.random.fork_rng(**forked):
        torch.manual_seed(seed)
        yield
