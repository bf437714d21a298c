"""Greedy cascades of many rules at once, over shared prefixes: the same texts and calls as ``decode`` writes.

At temperature 0 a cascade emits the drafter's argmax or the verifier's, so that all settings of all rules walk one
tree with two branches at a place. Both models score every prefix once, whoever comes there, and each setting keeps its
own place in the block. A study that decodes a hundred settings pays for a few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from deferral_train.collecting.scoring import decoder_start
from deferral_train.decoding.hidden import tap_hidden
from deferral_train.decoding.pair import Pair, Settings, pad_batch
from deferral_train.evaluation.sequence_scores import TOKEN_NEEDS, defers
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules.base import PositionRule, Rule, TokenRule
from deferral_train.rules.summary import COMPUTED_FIELDS, Summary, summarize

CHUNK = 50  # prompts whose tree is walked together
ROWS = 512  # prefixes that go through a model together


@dataclass
class Walk:
    """One setting's text of one prompt, so far.

    Attributes:
        node: the prefix that it stands at. place: drafted tokens of the block. block: most of them: near the limit of
        the text fewer are drafted, so that the verifier's own token fits. calls: verifier passes. tokens: emitted.
        log_likelihood: of the tokens under the verifier, nats.
    """

    node: int
    place: int = 0
    block: int = 0
    calls: int = 0
    tokens: list[int] = field(default_factory=list)
    log_likelihood: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class Row:
    """A finished text as the lines of ``outputs.jsonl`` have it, and what the verifier makes of it, nats."""

    id: str
    rule: str
    text: str
    reference: str | None
    tokens: list[int]
    calls: int
    log_likelihood: float

    def as_line(self) -> dict[str, Any]:
        counts = {"verifier_calls": self.calls, "emitted": len(self.tokens)}
        return {
            "id": self.id, "rule": self.rule, "repetition": 0, "text": self.text, "reference": self.reference,
            "tokens": self.tokens, "counts": counts,
        }  # fmt: skip


class Scorer:
    """One model over the prefixes of a depth.

    Args:
        model: decoder-only or encoder-decoder. inputs: padded prompts.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], vocab_size: int) -> None:
        self.model, self.vocab_size, self.mask = model, vocab_size, inputs["attention_mask"]
        self.caches: list[Any] = []
        self.starts: list[int] = []
        self.encoded: Tensor | None = None
        if model.config.is_encoder_decoder:
            self.encoded = model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        elif self.mask.shape[1] > 1:  # a prompt's last token is the first that a step reads
            cache, mask = DynamicCache(), self.mask[:, :-1]
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            ids = inputs["input_ids"][:, :-1]
            model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
            self.caches, self.starts = [cache], [0]

    def step(
        self, prompts: Tensor, parents: Tensor, tokens: Tensor, hidden: bool, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] and states [N, D] once prefixes have read their last tokens [N].

        Args:
            prompts: of each prefix. parents: its place among the prefixes of the depth before, ascending.
            depth: tokens of the text before these.
        """
        logits, states, caches, starts = [], [], [], []
        for at in range(0, len(tokens), ROWS):
            rows = slice(at, at + ROWS)
            cache = self._cache(parents[rows], alone=len(tokens) <= ROWS)
            with tap_hidden(self.model, hidden) as tap:
                inputs = self._inputs(prompts[rows], tokens[rows, None], depth)
                output = self.model(**inputs, past_key_values=cache, use_cache=True)
                if tap is not None and tap.states is not None:
                    states.append(tap.states[:, -1].float())
            logits.append(output.logits[:, -1, : self.vocab_size].float())
            caches.append(cache)
            starts.append(at)
        self.caches, self.starts = caches, starts
        return torch.cat(logits), torch.cat(states) if states else None

    def _inputs(self, prompts: Tensor, tokens: Tensor, depth: int) -> dict[str, Any]:
        mask = self.mask[prompts]
        if self.encoded is not None:
            encoded = BaseModelOutput(last_hidden_state=self.encoded[prompts])
            return {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": tokens}
        whole = torch.cat([mask, mask.new_ones(len(mask), depth)], dim=1)
        return {"input_ids": tokens, "attention_mask": whole, "position_ids": whole.sum(1, keepdim=True) - 1}

    def _cache(self, parents: Tensor, alone: bool) -> Any:
        """Copies of the parents' caches, joined; an empty one at the first depth. ``alone``: nobody else reads them."""
        both = self.encoded is not None
        if not self.caches:
            return EncoderDecoderCache(DynamicCache(), DynamicCache()) if both else DynamicCache()
        parts = []
        for start, cache in zip(self.starts, self.caches):
            own = parents[(parents >= start) & (parents < start + ROWS)] - start
            if len(own):
                parts.append((cache, own))
        if not both:
            return _joined(parts, alone)
        kinds = ("self_attention_cache", "cross_attention_cache")
        return EncoderDecoderCache(
            *(_joined([(getattr(cache, name), own) for cache, own in parts], alone) for name in kinds)
        )


def _joined(parts: Sequence[tuple[Any, Tensor]], alone: bool) -> Any:
    """One cache of the chosen rows of several; a whole one that nobody else reads is itself."""
    first, own = parts[0]
    if alone and len(parts) == 1 and torch.equal(own, torch.arange(len(first.layers[0].keys))):
        return first
    joined = DynamicCache()
    for number in range(len(first.layers)):
        layers = [(cache.layers[number], own) for cache, own in parts]
        joined.update(
            torch.cat([layer.keys.index_select(0, own) for layer, own in layers]),
            torch.cat([layer.values.index_select(0, own) for layer, own in layers]),
            number,
        )
    return joined


@torch.inference_mode()
def decode_tree(
    pair: Pair,
    prompts: Sequence[Prompt],
    rules: Mapping[str, Rule],
    num_draft_tokens: int = 5,
    max_new_tokens: int = 64,
    chunk: int = CHUNK,
) -> list[Row]:
    """Texts and calls of every setting on every prompt; ``chunk`` prompts are in memory together."""
    encoded = pair.encode(prompts, Settings(max_new_tokens=max_new_tokens))
    rows: list[Row] = []
    order = sorted(range(len(prompts)), key=lambda n: len(encoded[n].input_ids))
    for at in range(0, len(order), chunk):
        numbers = order[at : at + chunk]
        walks = _walk(pair, [encoded[n].input_ids for n in numbers], rules, num_draft_tokens, max_new_tokens)
        for place, number in enumerate(numbers):
            for label in rules:
                walk, prompt = walks[label][place], prompts[number]
                text = pair.text(walk.tokens)
                rows.append(
                    Row(
                        prompt.id, label, text, prompt.reference, walk.tokens, walk.calls, walk.log_likelihood
                    )
                )
    return rows


def _walk(
    pair: Pair, ids: Sequence[list[int]], rules: Mapping[str, Rule], block: int, most: int
) -> dict[str, list[Walk]]:
    models = pair.models
    inputs = pad_batch(ids, int(pair.tokenizer.pad_token_id), models)
    size = models.vocab_size
    drafter, verifier = (Scorer(model, inputs, size) for model in (models.drafter, models.verifier))
    walks = {label: [Walk(n) for n in range(len(ids))] for label in rules}
    prompts = torch.arange(len(ids))
    parents, tokens = prompts, inputs["input_ids"][:, -1]
    if models.is_encoder_decoder:
        tokens = torch.full_like(prompts, decoder_start(models.verifier))
    for depth in range(most):
        q, _ = drafter.step(prompts, parents, tokens, False, depth)
        p, states = verifier.step(prompts, parents, tokens, True, depth)
        best_q, best_p = q.argmax(-1).tolist(), p.argmax(-1).tolist()
        summary = _summary(rules, q, p, states, depth)
        likely = [p[n, [best_q[n], best_p[n]]].double() - p[n].double().logsumexp(-1) for n in range(len(p))]
        decisions = {label: _defer(rule, q, p, summary).tolist() for label, rule in rules.items()}
        children: dict[tuple[int, int], list[Walk]] = {}
        for label, own in walks.items():
            for walk in own:
                if not walk.done:
                    if walk.place == 0:
                        walk.block = min(block, most - depth - 1)
                    token = _advance(walk, best_q[walk.node], best_p[walk.node], decisions[label][walk.node])
                    walk.log_likelihood += float(likely[walk.node][int(token == best_p[walk.node])])
                    _end(walk, token in models.eos_ids, depth + 1 == most)
                    if not walk.done:
                        children.setdefault((walk.node, token), []).append(walk)
        if not children:
            break
        nodes = sorted(children)
        for number, node in enumerate(nodes):
            for walk in children[node]:
                walk.node = number
        parents = torch.tensor([node for node, _ in nodes])
        tokens = torch.tensor([token for _, token in nodes])
        prompts = prompts[parents]
    return walks


def _advance(walk: Walk, drafted: int, best: int, defer: bool) -> int:
    """Emit a token: the bonus behind a whole block, the drafted one, or the verifier's in its place."""
    bonus = walk.place == walk.block
    token = best if bonus or defer else drafted
    if bonus or token != drafted:
        walk.calls, walk.place = walk.calls + 1, 0
    else:
        walk.place += 1
    walk.tokens.append(token)
    return token


def _end(walk: Walk, eos: bool, full: bool) -> None:
    """A text ends with the pass that verified its last block."""
    if eos or full:
        walk.done = True
        walk.calls += walk.place > 0


def _summary(rules: Mapping[str, Rule], q: Tensor, p: Tensor, states: Tensor | None, depth: int) -> Summary:
    """Every field that a rule reads, once for all rules."""
    needs = frozenset({"tv", *TOKEN_NEEDS}).union(*(getattr(rule, "needs", ()) for rule in rules.values()))
    summary = summarize(q, p, temperature=0.0, token=q.argmax(-1), fields=sorted(needs & COMPUTED_FIELDS))
    context = {"position": torch.full((len(q),), depth)} if "position" in needs else {}
    if "verifier_hidden" in needs:
        assert states is not None
        context["verifier_hidden"] = states
    return Summary({**dict(summary), **context})


def _defer(rule: Rule, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
    """Whether a rule emits another token than the drafter's argmax, bool [N]."""
    if not isinstance(rule, PositionRule | TokenRule):
        return rule.target(q, p, temperature=0.0).argmax(-1) != q.argmax(-1)
    return defers(rule, summary)
