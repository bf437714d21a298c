"""From a model's logits to the distributions that rules decide by and tokens are drawn from.

transformers hands over one list of logits processors. Temperature and truncation warpers shape only the
sampling distribution; everything else (penalties, bans, constraints) shapes the decision distribution too, and sees
each drafted prefix.
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
    hf.DiaEOSDelayPatternLogitsProcessor,
    hf.WhisperNoSpeechDetection,
)


def needs_real_rows(one: Any) -> bool:
    """True where a processor or criterion may fail on text that no row has: the user's own, or one asking a function.

    transformers' own look at each row by itself, whatever stands in the others.
    """
    own = type(one).__module__.split(".")[0] == "transformers"
    return not own or isinstance(one, hf.PrefixConstrainedLogitsProcessor)


class SamplingDistributions:
    """Splits a prepared list of logits processors and applies its parts.

    Args:
        processors: as prepared by ``generate``.
        do_sample: False is greedy.
        vocab_size: logits beyond this many columns are padding of a model's vocabulary and cut off, once the
            processors have seen them.

    Attributes:
        temperature: 0 when greedy, else the temperature of the sampling distribution.
        strict: a processor may be shown nothing but prefixes that rows have, as ``generate`` shows them.

    Raises:
        InputError: a processor that cannot see drafted prefixes.
    """

    def __init__(self, processors: Sequence[Any], do_sample: bool, vocab_size: int | None = None) -> None:
        for processor in processors:
            if isinstance(processor, UNSUPPORTED):
                raise InputError(
                    f"logits processor {type(processor).__name__}: keeps a state of its own; leave it out"
                )
        self.vocab_size = vocab_size
        # Greedy, generate makes no warpers: those of the caller are processors like others, in their order.
        self.processors = [one for one in processors if not (do_sample and isinstance(one, WARPERS))]
        self.strict = any(needs_real_rows(one) for one in self.processors)
        self._asked_before: set[int] = set()
        warpers = [one for one in processors if isinstance(one, WARPERS)] if do_sample else []
        temperatures = [one.temperature for one in warpers if isinstance(one, hf.TemperatureLogitsWarper)]
        self.temperature = (float(temperatures[-1]) if temperatures else 1.0) if do_sample else 0.0
        self._shaping: list[Any] = [] if len(warpers) == len(temperatures) <= 1 else warpers
        # A processor behind a warper (watermarks) must stay behind it in the sampling distribution.
        mixed = do_sample and any(
            isinstance(a, WARPERS) and not isinstance(b, WARPERS) for a, b in itertools.pairwise(processors)
        )
        self._whole = list(processors) if mixed else None

    @property
    def shapes(self) -> bool:
        """True where the sampling distribution is more than softmax(decision / temperature)."""
        return self._whole is not None or bool(self._shaping)

    def decision(
        self, logits: Tensor, tokens: TokenRows, offset: int = 0, drafted: Drafted | None = None
    ) -> Tensor:
        """Decision logits of ``logits`` [B, k, V], whose row j follows the prefix of ``offset + j`` more tokens.

        Args:
            drafted: what each row has drafted, where the host knows.
        """
        return self._cut(self._through(self.processors, logits, tokens, offset, drafted))

    def sampling(
        self,
        logits: Tensor,
        decision: Tensor,
        tokens: TokenRows,
        offset: int = 0,
        drafted: Drafted | None = None,
    ) -> Tensor | None:
        """Logits after temperature and truncation [B, k, V]; None where softmax(decision / temperature) is meant."""
        if self._whole is not None:
            return self._cut(self._through(self._whole, logits, tokens, offset, drafted))
        if not self._shaping:
            return None
        shaped = decision.flatten(0, 1)
        for warper in self._shaping:
            shaped = warper(tokens.ids, shaped)  # warpers look at the scores alone
        return shaped.view_as(decision)

    def numbers(
        self, rows: int, draws: int, generator: torch.Generator | None, device: torch.device
    ) -> Tensor | None:
        """Random numbers [rows, draws] in [0, 1), float64, for so many tokens of each row; None where greedy."""
        if self.temperature == 0.0:
            return None
        source = device if generator is None else generator.device
        numbers = torch.rand(rows, draws, dtype=torch.float64, device=source, generator=generator)
        return numbers.to(device)

    def draw(
        self, decision: Tensor, sampling: Tensor | None, number: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """One token per row [B] from logits [B, V]; at temperature 0 the lowest argmax.

        Args:
            number: [B] in [0, 1), inverted through the cumulative sum: no copy to the host. A token of probability
                0 is never drawn; float64, since a float32 sum over a large vocabulary would lose the tail.
            out: [B, 1] to write the tokens to.
        """
        if number is None:
            logits = decision if sampling is None else sampling
            return torch.argmax(logits, dim=-1, keepdim=True, out=out)[:, 0]
        if sampling is None:
            sampling = decision if self.temperature == 1.0 else decision / self.temperature
        cumulative = torch.softmax(sampling, dim=-1).cumsum(dim=-1, dtype=torch.float64)
        threshold = cumulative[:, -1:] * number[:, None]
        found = torch.searchsorted(cumulative, threshold, right=True, out=out)
        # Logits that are not finite give no index; verification refuses them.
        return found.clamp_(max=cumulative.shape[-1] - 1)[:, 0]

    def draw_one(
        self, decision: Tensor, sampling: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """One token per row [B] from logits [B, V], with a random number of its own."""
        numbers = self.numbers(len(decision), 1, generator, decision.device)
        return self.draw(decision, sampling, None if numbers is None else numbers[:, 0])

    def _cut(self, logits: Tensor) -> Tensor:
        narrow = self.vocab_size is not None and logits.shape[-1] > self.vocab_size
        return logits[..., : self.vocab_size] if narrow else logits

    def _through(
        self,
        processors: Sequence[Any],
        logits: Tensor,
        tokens: TokenRows,
        offset: int,
        drafted: Drafted | None,
    ) -> Tensor:
        if not processors or not logits.shape[1]:
            return logits
        if self.strict:
            return self._as_shown(processors, logits, tokens, offset, drafted)
        result = logits.clone()
        for length, places, steps in _by_length(tokens.lengths, logits.shape[1], offset):
            # Processors get the rows of the whole call: some keep per-row facts (encoder ids).
            rows = tokens.index[places]
            scores = logits.new_zeros(len(tokens.ids), logits.shape[-1])
            scores[rows] = logits[places, steps]
            for processor in processors:
                scores = processor(tokens.ids[:, :length], scores)
            result[places, steps] = scores[rows]
        return result

    def _as_shown(
        self,
        processors: Sequence[Any],
        logits: Tensor,
        tokens: TokenRows,
        offset: int,
        drafted: Drafted | None,
    ) -> Tensor:
        """As ``generate`` would ask: all rows at one length, each with its own text, padding behind an end.

        Places behind a forbidden token, or behind the shortest draft, are left as they are: no row gets there.
        """
        result = logits.clone()
        reach = logits.shape[1] if drafted is None else min(logits.shape[1], drafted.reach - offset)
        for step in range(reach):
            scores = logits.new_zeros(len(tokens.ids), logits.shape[-1])
            scores[tokens.index] = logits[:, step]
            shown = tokens.shown(offset + step, None if drafted is None else drafted.ended)
            for processor in processors:
                scores = self._asked(processor, shown, scores)
            result[:, step] = scores[tokens.index]
            if step + 1 < reach and self._stops_here(result[:, step], tokens, offset + step, drafted):
                break
        return result

    def _asked(self, processor: Any, shown: Tensor, scores: Tensor) -> Tensor:
        """Scores as a processor changes them; one that counts its calls would count dropped drafts, too.

        Raises:
            InputError: numbers that it keeps have changed, and not in its first call, which may set up what it needs.
        """
        before = _numbers_kept(processor)
        scores = processor(shown, scores)
        changed = [name for name, value in _numbers_kept(processor).items() if before.get(name) != value]
        if changed and id(processor) in self._asked_before:
            raise InputError(
                f"logits processor {type(processor).__name__}: its {changed[0]} changes from call to call, and it is "
                "asked about drafts that are dropped; let it read the text that it is given instead"
            )
        self._asked_before.add(id(processor))
        return scores

    def _stops_here(self, scores: Tensor, tokens: TokenRows, place: int, drafted: Drafted | None) -> bool:
        """True where a row that goes on has drafted a token at ``place`` that its scores [B, V] forbid."""
        token = tokens.window(0, place + 1)[:, -1:]
        forbidden = scores.gather(1, token)[:, 0] == -torch.inf
        ended = [None] * len(scores) if drafted is None else drafted.ended
        return any(flag for flag, end in zip(forbidden.tolist(), ended) if end is None or end > place)


def _numbers_kept(processor: Any) -> dict[str, float]:
    """Numbers among the attributes of a processor of the caller's own."""
    if not needs_real_rows(processor):
        return {}
    return {
        name: one for name, one in getattr(processor, "__dict__", {}).items() if isinstance(one, int | float)
    }


class Drafted:
    """How many tokens each row has drafted, on the host.

    Args:
        counts: [B] tokens of each row.
        ends: [B] whether a row's draft ends the row.

    Attributes:
        ended: [B] tokens of rows that end, None for others.
        reach: places that a row may get to together with the others: those of the shortest draft and one behind it.
    """

    def __init__(self, counts: Sequence[int], ends: Sequence[bool]) -> None:
        self.ended = [count if end else None for count, end in zip(counts, ends)]
        going = [count for count, end in zip(counts, ends) if not end]
        self.reach = min(going) + 1 if going else max(counts, default=0)


def _by_length(lengths: Sequence[int], steps: int, offset: int) -> list[tuple[int, list[int], list[int]]]:
    """Group (row, step) by prefix length: processors must see rows exactly as long as they are."""
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for place, length in enumerate(lengths):
        for step in range(steps):
            places, steps_there = groups.setdefault(length + offset + step, ([], []))
            places.append(place)
            steps_there.append(step)
    return [(length, *groups[length]) for length in sorted(groups)]
