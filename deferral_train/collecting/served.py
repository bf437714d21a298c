"""Finish texts in a serving engine that holds the verifier: what transformers does in ``continuations``, by requests.

A branch is a request: prompt, the path's tokens before its place, its own token. The engine batches them as it likes,
and the beginnings that they share are in its prefix cache. Above temperature 0 a request brings its own uniform
numbers, so that both continuations of a place share theirs here as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deferral_train.collecting.config import CollectConfig
from deferral_train.collecting.continuations import Branch, Ends, NextToken, PathTexts, Tally
from deferral_train.collecting.launch import processes
from deferral_train.collecting.prefixes import Continuations
from deferral_train.errors import InputError
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.load import ModelPair
from deferral_train.traces.kinds import SEQUENCE_LABELS


class TextEngine(Protocol):
    """A serving engine that holds the verifier of a pair and does not speculate."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, version and runner: what decides its texts besides the weights."""

    def write(
        self,
        beginnings: Sequence[Sequence[int]],
        most: Sequence[int],
        vocab_size: int,
        temperature: float = 0.0,
        numbers: Sequence[Sequence[float]] = (),
    ) -> list[list[int]]:
        """Have the verifier write behind each beginning, up to and with an end of sequence.

        Args:
            beginnings: token ids.
            most: tokens to write, at most, of each.
            vocab_size: ids from this one on are never written.
            temperature: 0 is greedy.
            numbers: above it, uniform numbers that each one's tokens are drawn with, in order.
        """


@dataclass(frozen=True)
class ServedVerifier:
    """Finishes texts by requests to an engine, see :class:`~deferral_train.collecting.continuations.Finisher`.

    Attributes:
        engine: holds the verifier.
        vocab_size: tokens that both models know.
        ends: where a text ends.
        tally: counts what is written.
    """

    engine: TextEngine
    vocab_size: int
    ends: Ends
    tally: Tally = field(default_factory=Tally)

    def finish(
        self, path: PathTexts, branches: Sequence[Branch], choice: NextToken
    ) -> dict[Branch, list[int]]:
        """All branches in one batch of requests, those of one prompt behind each other."""
        finished, open_ = self.ends.begin(path, branches)
        open_.sort(key=lambda one: (one.row, one.place, one.token, one.sample))
        most = [self.ends.max_new_tokens - len(finished[one]) for one in open_]
        beginnings = [[*path.prompts[one.row], *finished[one]] for one in open_]
        numbers = [choice.numbers(one, count) for one, count in zip(open_, most)]
        written = self.engine.write(beginnings, most, self.vocab_size, choice.temperature, numbers)
        for one, tokens in zip(open_, written):
            finished[one] += tokens
            self.tally.texts += 1
            self.tally.tokens += len(tokens)
        return finished


@dataclass(frozen=True)
class ServedText:
    """The verifier's own greedy text as a path, written by the engine; a prefix source."""

    engine: TextEngine
    max_new_tokens: int

    def __call__(self, pair: ModelPair, prompts: Sequence[EncodedPrompt], seed: int) -> Continuations:
        most = [self.max_new_tokens] * len(prompts)
        written = self.engine.write([prompt.input_ids for prompt in prompts], most, pair.vocab_size)
        return Continuations(written, gold=False)


def check_served(config: CollectConfig) -> None:
    """Refuse, before anything is loaded, what labels by an engine cannot be collected with.

    Raises:
        InputError: the setting, its value and the remedy.
    """
    if config.labels != SEQUENCE_LABELS:
        raise InputError(
            f"labels={config.labels!r} with engine 'vllm': the engine finishes the texts of labels 'sequence' alone; "
            "use engine transformers"
        )
    devices, num_nodes = processes(config.devices, config.num_nodes)
    if devices * num_nodes > 1:
        raise InputError(
            f"devices={devices}, num_nodes={num_nodes} with engine 'vllm': one process holds the engine; start one"
        )
    if config.device_map is not None:
        raise InputError(
            f"device_map={config.device_map!r} with engine 'vllm': the engine places its own copy of the verifier; "
            "leave it out"
        )
