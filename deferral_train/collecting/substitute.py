"""Substitute and rescore: what does the verifier's own text become worth with the drafter's token in one place?

SelfJudge (arXiv 2510.02329): along the verifier's text y, where the drafter's argmax z is another token,

    s = [log P(z_i | y_<i) - log P(y_i | y_<i)] + [log P(y_>i | y_<i, z_i) - log P(y_>i | y_<=i)],

the second bracket over a window of N tokens. The prefix is never run again: each substitution starts from a copy of
the cache of the text's own pass, cut before place i, and the encoder's states. Substitutions that begin at the same
column run together, in any prompt of the batch, so that no row is padded on the left. R substitutions, M logit rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from deferral_train.collecting.scoring import Past, half
from deferral_train.decoding.hidden import tap_hidden
from deferral_train.pairs.padding import pad


@dataclass(frozen=True)
class Substitution:
    """One token to put in another's place.

    Attributes:
        row: of the batch.
        place: of the token among those that follow the prompt.
        column: of the token in the decoder's input.
        token: the drafter's.
    """

    row: int
    place: int
    column: int
    token: int


def rescore(
    model: Any,
    past: Past,
    texts: Sequence[Sequence[int]],
    logprobs: Sequence[Tensor],
    own: Sequence[Substitution],
    window: int,
    vocab_size: int,
    batch_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Run every substitution.

    Args:
        model: the verifier.
        past: of its pass over the texts.
        texts: tokens that follow each prompt.
        logprobs: log P of each text's tokens under the verifier, [L] per text.
        own: the substitutions, at least one.
        window: N, tokens after the place that are rescored; 0 scores none and gives the hidden states alone.
        vocab_size: columns that are tokens.
        batch_tokens: most padded tokens per pass.

    Returns:
        log P(y_>i | y_<i, z_i) - log P(y_>i | y_<=i) over the window, [R] float64 nats; the verifier's last hidden
        state once it has read z_i, [R, D] float16. Both in the order of ``own``.
    """
    order: list[int] = []
    totals, states = [], []
    for numbers in _passes(own, texts, window, batch_tokens):
        group = [own[number] for number in numbers]
        after = [list(texts[one.row][one.place + 1 : one.place + 1 + window]) for one in group]
        found, state = _run(model, past, group, after, vocab_size)
        before = [logprobs[one.row][one.place + 1 : one.place + 1 + window].double().sum() for one in group]
        order += numbers
        totals.append(found - torch.stack(before))
        states.append(state)
    back = torch.tensor(order, device=states[0].device).argsort()
    return torch.cat(totals)[back], torch.cat(states)[back]


def _passes(
    own: Sequence[Substitution], texts: Sequence[Sequence[int]], window: int, most: int
) -> Iterator[list[int]]:
    """Numbers of substitutions that run together: same column, like length, at most ``most`` padded tokens."""

    def length(number: int) -> int:
        one = own[number]
        return 1 + min(window, len(texts[one.row]) - one.place - 1)

    order = sorted(range(len(own)), key=lambda n: (own[n].column, -length(n)))
    group: list[int] = []
    for number in order:
        if group and (
            own[group[0]].column != own[number].column
            or (len(group) + 1) * (own[number].column + length(group[0])) > most
        ):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _run(
    model: Any, past: Past, group: Sequence[Substitution], after: Sequence[list[int]], vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Summed log P of the tokens after each substitution [R] float64, and the state at its own place [R, D]."""
    rows = torch.tensor([one.row for one in group], device=model.device)
    ids = pad([[one.token, *tokens[:-1]] for one, tokens in zip(group, after)], 0).to(rows.device)
    arguments: dict[str, Any] = {"past_key_values": cut_cache(past, rows, group[0].column), "use_cache": True}
    if past.encoder is not None:
        mask = past.encoder_mask
        arguments |= {
            "decoder_input_ids": ids,
            "encoder_outputs": BaseModelOutput(last_hidden_state=past.encoder.index_select(0, rows)),
            "attention_mask": None if mask is None else mask.index_select(0, rows),
        }
    else:
        arguments["input_ids"] = ids
    with tap_hidden(model) as tap:
        logits = model(**arguments).logits[..., :vocab_size]
        assert tap is not None
        assert tap.states is not None
        states = half(tap.states[:, 0])
    totals = torch.zeros(len(group), dtype=torch.float64, device=rows.device)
    if any(after):
        targets = pad(after, 0).to(rows.device)
        lengths = torch.tensor([len(tokens) for tokens in after], device=rows.device)
        logprobs = logits[:, : targets.shape[1]].float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
        inside = torch.arange(targets.shape[1], device=rows.device) < lengths[:, None]
        totals = (logprobs.double() * inside).sum(1)
    return totals, states


def cut_cache(past: Past, rows: Tensor, columns: int) -> Any:
    """A cache of these rows that ends before a column. Layers are full, whatever window the model looks through."""
    own = DynamicCache()
    whole = past.cache.self_attention_cache if isinstance(past.cache, EncoderDecoderCache) else past.cache
    _copy(whole, own, rows, columns)
    if not isinstance(past.cache, EncoderDecoderCache):
        return own
    cross = DynamicCache()
    _copy(past.cache.cross_attention_cache, cross, rows, None)
    return EncoderDecoderCache(own, cross)


def _copy(source: Any, target: Any, rows: Tensor, columns: int | None) -> None:
    for number, layer in enumerate(source.layers):
        if layer.is_initialized:
            target.update(
                layer.keys[:, :, :columns].index_select(0, rows),
                layer.values[:, :, :columns].index_select(0, rows),
                number,
            )
