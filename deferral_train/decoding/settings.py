"""How to decode: one object, from ``Pair.generate`` and the command line down to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deferral_train.errors import InputError

if TYPE_CHECKING:
    from deferral_train.decoding.drafting.plan import Plan
    from deferral_train.decoding.stopping import StopDrafting


BLOCKS = ("tight", "served")
VLLM = "vllm"
ENGINES = ("transformers", VLLM)  # this package's loop over transformers, and what else decodes


@dataclass(frozen=True)
class Settings:
    """How to decode; the same meaning as the arguments of ``cascade_generate``.

    Attributes:
        num_draft_tokens: most tokens drafted per block.
        max_new_tokens: most tokens emitted per prompt.
        batch_size: prompts decoded together.
        temperature: 0 is greedy.
        top_k: candidates that the sampling distribution keeps; 0 keeps all.
        top_p: probability that the sampling distribution keeps; 1 keeps all.
        seed: of the sampling; every batch draws from its own stream of it.
        execution: ``speculative``, ``token``, ``lazy`` or ``sequence``.
        bonus: distribution of the token after a block emitted whole: ``verifier`` or ``exact``.
        verification: ``token`` checks drafted tokens one by one, ``block`` together: longer drafts stand at the same
            output distribution (bonus ``exact``, or a lossless rule).
        blocks: ``tight``, or ``served``: where serving engines lay them. There the verifier gives the first token and
            the last block runs over the limit, so that texts of a lossy rule are those of ``decode --engine vllm``.
        max_request_loss: bound on the summed estimated loss of kept tokens per prompt.
        stop: adaptive draft length.
        stop_strings: end a row once its text holds one of these.
        chat: use the tokenizer's chat template: ``auto``, ``on`` or ``off``.
        accept_mismatch: go on with a head made for other weights, dtype or temperature.
        drafting: plan of a cascade of drafters, the pair's own at its top (none for Max-Gram alone); then
            ``num_draft_tokens`` is not read.

    Raises:
        InputError: a value that cannot be meant.
    """

    num_draft_tokens: int = 5
    max_new_tokens: int = 128
    batch_size: int = 8
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    execution: str = "speculative"
    bonus: str = "verifier"
    verification: str = "token"
    blocks: str = "tight"
    max_request_loss: float | None = None
    stop: StopDrafting | None = None
    stop_strings: Sequence[str] = ()
    chat: str = "auto"
    accept_mismatch: bool = False
    drafting: Plan | None = None

    def __post_init__(self) -> None:
        for name in ("num_draft_tokens", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; give an integer of at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; give a number >= 0 (0 is greedy)")
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_k is {self.top_k}, top_p {self.top_p}; give top_k >= 0 and 0 < top_p <= 1")

    def described(self) -> dict[str, Any]:
        """The settings as plain values, for records."""
        values = asdict(replace(self, stop=None, drafting=None))
        drafting = None if self.drafting is None else self.drafting.described()
        return values | {"stop": repr(self.stop), "drafting": drafting}


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of a run of ``decode``: prompts decoded under several rules side by side.

    Attributes:
        settings: of the decoding itself.
        repetitions: times that every batch is decoded with every rule; rules take turns batch by batch, so that
            whatever else the machine does falls on all of them.
        log_tokens: candidates per model to record for every token; 0 records none.
        sort_by_length: put prompts of like length into one batch.
    """

    settings: Settings = field(default_factory=Settings)
    repetitions: int = 1
    log_tokens: int = 0
    sort_by_length: bool = True

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise InputError(f"repetitions is {self.repetitions}; give at least 1")
        if self.log_tokens < 0:
            raise InputError(f"log_tokens is {self.log_tokens}; give a number of candidates, 0 for none")
