"""From a model's logits to the laws that rules decide by and tokens are drawn from.

transformers hands over one list of logits processors. Temperature and truncation warpers shape only the
sampling law; everything else (penalties, bans, constraints) shapes the decision law too, and sees each
drafted prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from deferral_train.decoding.tokens import TokenRows
from deferral_train.errors import InputError
from deferral_train.rules.laws import lowest_argmax
from deferral_train.rules.sampling import draw, uniforms

WARPERS = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
)
# They run the model, or keep a state that advances once per call: neither survives a drafted prefix being
# dropped.
UNSUPPORTED = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
)


class SamplingLaws:
    """Splits a prepared list of logits processors and applies its parts.

    Attributes:
        temperature: 0 when greedy, else the temperature of the sampling law.

    Raises:
        InputError: a processor that cannot see drafted prefixes.
    """

    def __init__(self, processors: Sequence[Any], do_sample: bool) -> None:
        for processor in processors:
            if isinstance(processor, UNSUPPORTED):
                raise InputError(
                    f"logits processor {type(processor).__name__}: keeps a state of its own; leave it out"
                )
        self.processors = [one for one in processors if not isinstance(one, WARPERS)]
        warpers = [one for one in processors if isinstance(one, WARPERS)] if do_sample else []
        temperatures = [one.temperature for one in warpers if isinstance(one, hf.TemperatureLogitsWarper)]
        self.temperature = (float(temperatures[-1]) if temperatures else 1.0) if do_sample else 0.0
        self._shaping: list[Any] = [] if len(warpers) == len(temperatures) <= 1 else warpers
        # A processor behind a warper (watermarks) must stay behind it in the sampling law.
        last = [one for one in processors if do_sample or not isinstance(one, WARPERS)]
        mixed = any(
            isinstance(a, WARPERS) and not isinstance(b, WARPERS) for a, b in itertools.pairwise(last)
        )
        self._whole = last if mixed else None

    @property
    def shapes(self) -> bool:
        """Whether the sampling law is more than softmax(decision / temperature)."""
        return self._whole is not None or bool(self._shaping)

    def decision(self, logits: Tensor, tokens: TokenRows, offset: int = 0) -> Tensor:
        """Decision logits of ``logits`` [B, k, V], whose row j follows the prefix of ``offset + j`` more
        tokens.
        """
        return self._through(self.processors, logits, tokens, offset)

    def sampling(self, logits: Tensor, decision: Tensor, tokens: TokenRows, offset: int = 0) -> Tensor | None:
        """Logits after temperature and truncation [B, k, V]; None where softmax(decision / temperature) is
        meant.
        """
        if self._whole is not None:
            return self._through(self._whole, logits, tokens, offset)
        if not self._shaping:
            return None
        shaped = decision.flatten(0, 1)
        for warper in self._shaping:
            shaped = warper(tokens.ids, shaped)  # warpers look at the scores alone
        return shaped.view_as(decision)

    def draw(self, decision: Tensor, sampling: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """One token per row from logits [B, V]; at temperature 0 the argmax, drawing nothing.

        Sampling takes one random number per row and inverts the cumulative sum, with no copy to the host.
        """
        if self.temperature == 0.0:
            return lowest_argmax(decision if sampling is None else sampling)
        law = torch.softmax(decision / self.temperature if sampling is None else sampling, dim=-1)
        number = uniforms(len(law), 0, generator, law)[1]
        # A law that is not finite gives no index; verification refuses its logits.
        return draw(law, number).clamp_(max=law.shape[-1] - 1)

    def _through(self, processors: Sequence[Any], logits: Tensor, tokens: TokenRows, offset: int) -> Tensor:
        if not processors or not logits.shape[1]:
            return logits
        result = logits.clone()
        for length, places, steps in _by_length(tokens.lengths, logits.shape[1], offset):
            # Processors get the rows of the whole call: some keep per-row facts (padding, constraints by
            # batch id).
            rows = tokens.index[places]
            scores = logits.new_zeros(len(tokens.ids), logits.shape[-1])
            scores[rows] = logits[places, steps]
            for processor in processors:
                scores = processor(tokens.ids[:, :length], scores)
            result[places, steps] = scores[rows]
        return result


def _by_length(lengths: Sequence[int], steps: int, offset: int) -> list[tuple[int, list[int], list[int]]]:
    """Group (row, step) by prefix length: processors must see rows exactly as long as they are."""
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for place, length in enumerate(lengths):
        for step in range(steps):
            places, steps_there = groups.setdefault(length + offset + step, ([], []))
            places.append(place)
            steps_there.append(step)
    return [(length, *groups[length]) for length in sorted(groups)]
