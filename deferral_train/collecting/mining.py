"""AutoJudge labels (arXiv 2504.20039): a token matters if swapping the drafter's in changes what comes of the text.

Semi-greedy search along the verifier's greedy text, left to right: at each place where the drafter favours another
token, put it in, let the verifier continue greedily, and compare the finished text with the verifier's own. Where it
is as good, the swap stays and the search goes on along the new text; else the token is important and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deferral_train.collecting.prefixes import Continuations, FromModel, greedy_continuations
from deferral_train.collecting.scoring import make_inputs, score
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.load import ModelPair
from deferral_train.rules.distributions import lowest_argmax

Quality = Callable[
    [Sequence[str], Sequence[str]], Sequence[float]
]  # texts, references -> scores, more is better
ACCEPTABLE, IMPORTANT = 1, -1


@dataclass
class _Search:
    """One text under search: ``argmaxes`` are the drafter's along ``tokens``; places before ``place`` are settled."""

    prompt: EncodedPrompt
    tokens: list[int]
    reference: str
    own: float  # quality of the verifier's own text
    argmaxes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    place: int = 0

    def next_mismatch(self) -> bool:
        """Go to the next place where the drafter favours another token; False at the end."""
        while self.place < len(self.tokens) and self.argmaxes[self.place] == self.tokens[self.place]:
            self.labels.append(0)
            self.place += 1
        return self.place < len(self.tokens)

    def settle(self, label: int) -> None:
        self.labels.append(label)
        self.place += 1


@dataclass(frozen=True)
class Mined:
    """A prefix source: the texts that the search ends with, and its verdict on every token.

    Args:
        max_new_tokens: most tokens of a text.
        quality: of finished texts.
        tolerance: most loss of quality, against the verifier's own text, that a swap may cost.
    """

    max_new_tokens: int
    quality: Quality
    tolerance: float

    def __call__(self, pair: ModelPair, prompts: Sequence[EncodedPrompt], seed: int) -> Continuations:
        own = FromModel("verifier", 0.0, self.max_new_tokens)(pair, prompts, seed).tokens
        texts = [_text(pair, tokens) for tokens in own]
        # Without a reference the verifier's own text is what must not change.
        references = [
            _text(pair, prompt.reference_ids) if prompt.reference_ids else text
            for prompt, text in zip(prompts, texts)
        ]
        worth = self.quality(texts, references)
        searches = [
            _Search(prompt, list(tokens), reference, float(value))
            for prompt, tokens, reference, value in zip(prompts, own, references, worth)
        ]
        _argmaxes(pair, searches)
        while open_ := [one for one in searches if one.next_mismatch()]:
            self._round(pair, open_)
        return Continuations([one.tokens for one in searches], False, labels=[one.labels for one in searches])

    def _round(self, pair: ModelPair, searches: Sequence[_Search]) -> None:
        """One swap in every text that is still searched."""
        swapped = [[*one.tokens[: one.place], one.argmaxes[one.place]] for one in searches]
        finished = greedy_continuations(pair, [one.prompt for one in searches], swapped, self.max_new_tokens)
        worth = self.quality(
            [_text(pair, tokens) for tokens in finished], [one.reference for one in searches]
        )
        changed = []
        for one, tokens, value in zip(searches, finished, worth):
            if one.own - float(value) <= self.tolerance:
                one.settle(ACCEPTABLE)
                one.tokens = tokens
                changed.append(one)
            else:
                one.settle(IMPORTANT)
        _argmaxes(pair, changed)


def _argmaxes(pair: ModelPair, searches: Sequence[_Search]) -> None:
    """The drafter's argmax at every place of the texts."""
    if not searches:
        return
    ids, texts = [one.prompt.input_ids for one in searches], [one.tokens for one in searches]
    inputs = make_inputs(pair.drafter, ids, texts, pair.drafter.device)
    logits = score(pair.drafter, inputs).logits[:, : pair.vocab_size].index_select(0, inputs.rows)
    found = lowest_argmax(logits).split([len(tokens) for tokens in texts])
    for one, argmaxes in zip(searches, found):
        one.argmaxes = argmaxes.tolist()


def _text(pair: ModelPair, tokens: Sequence[int]) -> str:
    return pair.tokenizer.decode(list(tokens), skip_special_tokens=True)
