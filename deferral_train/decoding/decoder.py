"""The interface of whatever ``decode`` decodes with: a pair in this process, a serving engine, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from deferral_train.decoding.pair import BatchResult
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.stopping import StopDrafting
from deferral_train.errors import InputError
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules.base import Rule


class NotRunError(InputError):
    """A rule cannot be run here, whatever the settings: its row of the table says why, and the others go on."""


class Decoder(Protocol):
    """Prompts in, emitted tokens and counts out; `deferral_train.decoding.pair.Pair` is one."""

    def check(self, rule: Rule, options: Settings) -> list[str]:
        """Refuse a rule that does not belong to these models; returns the mismatches that were accepted."""
        ...

    def encode(self, prompts: Sequence[Prompt], options: Settings) -> list[EncodedPrompt]:
        """Ids of every prompt; refuses the first that is empty or does not fit."""
        ...

    def group(
        self, encoded: Sequence[EncodedPrompt], options: Settings, sort: bool
    ) -> list[list[EncodedPrompt]]:
        """Prompts as they are handed over together; ``sort`` puts those of like length into one batch."""
        ...

    def turn(self, rule: Rule) -> str:
        """Rules of one turn are decoded side by side, batch by batch; turns come one after the other."""
        ...

    def decode_batch(
        self,
        batch: Sequence[EncodedPrompt],
        rule: Rule,
        options: Settings,
        stop: StopDrafting | None,
        number: int,
        token_log: Any = None,
    ) -> BatchResult:
        """Decode prompts together; ``number`` picks their stream of random numbers.

        Raises:
            NotRunError: the rule's turn cannot be run here.
        """
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Emitted ids as text, special tokens left out."""
        ...

    def facts(self, options: Settings) -> dict[str, Any]:
        """Conditions of a certificate besides the weights: engine, number formats, temperature, vocabulary."""
        ...

    def record(self, options: Settings) -> dict[str, Any]:
        """Facts that decide outputs beside rules, prompts and settings: ``pair``, ``models``, ``tokenizer``,
        ``conditions``.
        """
        ...

    def sizes(self) -> dict[str, Any]:
        """Type and size of the models, by role."""
        ...
