"""The thing that a run decodes with: the loop over a pair in this process, or vLLM. Stages say prompts and rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.pair import Pair
from deferral_train.decoding.settings import ENGINES, VLLM
from deferral_train.errors import InputError
from deferral_train.evaluation.outputs import LIKELIHOOD
from deferral_train.pairs.load import ModelPair
from deferral_train.pairs.prompts import Prompt
from deferral_train.pipeline.config import PairSection
from deferral_train.rules.base import Rule
from deferral_train.serving.engine_pair import EnginePair, check_decode
from deferral_train.serving.models import import_vllm
from deferral_train.serving.running import EngineSettings
from deferral_train.serving.writing import GPU_SHARE, WritingEngine, context_of


class StageDecoder:
    """Decodes prompts under rules, into a folder, in the engine that was asked for.

    Args:
        load: the pair in this process; called once, when something needs it.
        settings: how vLLM is opened for the pair, where it decodes; block size and requests at once are those of each
            call. None decodes in the loop.
    """

    def __init__(self, load: Callable[[], ModelPair], settings: EngineSettings | None = None) -> None:
        self.settings, self._load = settings, load

    @cached_property
    def models(self) -> ModelPair:
        """The pair in this process."""
        return self._load()

    @property
    def served(self) -> bool:
        """True where a serving engine decodes."""
        return self.settings is not None

    def decode(
        self, prompts: Sequence[Prompt], rules: Mapping[str, Rule], asked: DecodeConfig, out: Path
    ) -> dict[str, Any]:
        """As :func:`deferral_train.decoding.decode.decode`. vLLM lays blocks in its own way and logs no candidates."""
        if self.settings is None:
            return decode(Pair(self.models), prompts, rules, asked, out)
        asked = in_engine(asked)
        opened = replace(self.settings, num_draft_tokens=asked.settings.num_draft_tokens)
        with EnginePair(opened, list(rules.values()), asked.settings) as pair:
            return decode(pair, prompts, rules, asked, out)

    @contextmanager
    def writer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, sampled: bool
    ) -> Iterator[WritingEngine | None]:
        """The verifier in an engine that finishes texts behind these prompts; None where none decodes."""
        if self.settings is None:
            yield None
            return
        context = context_of(self.settings.verifier, prompts, "auto", None, max_new_tokens)
        with WritingEngine(replace(self.settings, context=context), sampled) as engine:
            yield engine

    def scoring(self, metrics: Sequence[str]) -> ModelPair | None:
        """Models for the metric that needs them; None where none does and an engine decodes."""
        return self.models if not self.served or LIKELIHOOD in metrics else None


def in_engine(asked: DecodeConfig) -> DecodeConfig:
    """A decoding as vLLM does it.

    Raises:
        InputError: an option that belongs to the loop alone.
    """
    served = replace(asked, log_tokens=0, settings=replace(asked.settings, blocks="served"))
    check_decode(served)
    return served


def engine_settings(
    section: PairSection, pair: Mapping[str, Any], seed: int, beside: bool = False
) -> EngineSettings:
    """How vLLM is opened for the models that the pair stage settled on.

    Args:
        beside: the pair is in this process as well, so that the engine takes a share of a GPU's memory.
    """
    options = {"gpu_memory_utilization": GPU_SHARE} if beside else {}
    return EngineSettings(
        pair["verifier"], pair["drafter"], device=section.device, dtype=section.dtype, seed=seed, options=options
    )  # fmt: skip


def engine_facts(engine: str) -> dict[str, str]:
    """Engine and version as far as they decide what stages write; empty for the loop, whose release says it.

    Raises:
        InputError: an unknown one.
        MissingExtraError: it is not installed.
    """
    if engine not in ENGINES:
        raise InputError(f"engine={engine!r}: use {' or '.join(ENGINES)}")
    return {"engine": f"{VLLM} {import_vllm().__version__}"} if engine == VLLM else {}
