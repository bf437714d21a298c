"""``decode --engine vllm``: a pair in vLLM in the place of the loop, and vLLM's own ways of decoding beside our rules.

One engine runs at a time. All rules share one, where they are put in force in turn; the models alone and vLLM's own
speculation have engines without our plug-in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from deferral_train.decoding.compatibility import check_head, heads_of
from deferral_train.decoding.decoder import NotRunError
from deferral_train.decoding.pair import BatchResult
from deferral_train.decoding.settings import DecodeConfig, Settings
from deferral_train.decoding.stopping import StopDrafting
from deferral_train.errors import InputError
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.fingerprint import tokenizer_fingerprint
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import Rule
from deferral_train.rules.position import Lossless
from deferral_train.serving.checks import check_served
from deferral_train.serving.models import needed_context
from deferral_train.serving.running import (
    Engine,
    EngineSettings,
    Sampling,
    needs_synchronous,
    planned_runner,
)

RULES = "rules"  # the turn of everything that the plug-in decides
ALONE = {"verifier_only": "verifier alone", "drafter_only": "drafter alone"}
OWN = "vllm:"  # what vLLM's own ways of decoding are called in tables
# Name -> vLLM's rejection_sample_method; None does not speculate.
BASELINES: dict[str, str | None] = {
    "no_speculation": None,
    "lossless": "standard",
    "block": "block",
    "fly": "fly",
}
# Prompts that are handed over at once, in units of those that run at once: a killed run repeats these.
HANDED_OVER = 32


@dataclass(frozen=True)
class EnginesOwn(Lossless):
    """Stands for what vLLM decides by itself in an engine without our plug-in.

    Attributes:
        method: a name of `BASELINES`.
    """

    name: ClassVar[str] = "vllm"
    method: str = "lossless"


def baselines(names: Sequence[str]) -> dict[str, Rule]:
    """Rules by label for vLLM's own ways of decoding.

    Raises:
        InputError: an unknown one, or one given twice.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"baselines: {unknown[0]!r} is unknown; known: {', '.join(BASELINES)}")
    if len(set(names)) < len(names):
        raise InputError("baselines: the same one is given twice; name each once")
    return {OWN + name: EnginesOwn(method=name) for name in names}


def check_decode(config: DecodeConfig, where: str = "engine vllm") -> None:
    """Refuse what belongs to this package's loop alone.

    Args:
        where: what decodes, for messages.

    Raises:
        InputError: naming the option and the remedy.
    """
    settings = config.settings
    wrong = {
        "stop": (settings.stop is not None, "the engine drafts blocks of one length; leave it out"),
        "drafting": (settings.drafting is not None, "the engine has one drafter; leave it out"),
        "log_tokens": (config.log_tokens > 0, "the engine hands no candidates over; use 0"),
        "execution": (settings.execution != "speculative", "the engine verifies blocks; use speculative"),
        "bonus": (settings.bonus != "verifier", "the engine's bonus tokens are the verifier's; use verifier"),
        "verification": (
            settings.verification != "token",
            "a rule's tokens are checked one by one there; use token, and vLLM's own by --baselines block",
        ),
    }
    for name, (is_wrong, remedy) in wrong.items():
        if is_wrong:
            value = getattr(config if name == "log_tokens" else settings, name)
            given = "given" if name in ("stop", "drafting") else f"{value!r}"
            raise InputError(f"{name} is {given} with {where}: {remedy}, or decode without it")


def handed_over(encoded: Sequence[EncodedPrompt], options: Settings) -> list[list[EncodedPrompt]]:
    """Prompts in the parts that are handed over at once, in their order."""
    size = HANDED_OVER * options.batch_size
    return [list(encoded[start : start + size]) for start in range(0, len(encoded), size)]


def request_seeds(options: Settings, number: int, count: int) -> list[int | None]:
    """A seed for each request of part ``number``; None where all is greedy."""
    if options.temperature == 0:
        return [None] * count
    return [((options.seed * 1_000_003 + number) * 65_537 + place) % (1 << 62) for place in range(count)]


class EnginePair:
    """A pair that decodes in vLLM; a `deferral_train.decoding.decoder.Decoder`.

    Args:
        settings: how to open the engine; context, rule and size of a step are set from what is decoded.
        rules: all that will be decoded, so that the engine is opened as they need it.
        options: of the decoding.

    Raises:
        InputError: models or options that the engine does not take.
        MissingExtraError: vLLM is not installed.
    """

    def __init__(self, settings: EngineSettings, rules: Sequence[Rule], options: Settings) -> None:
        self.models = settings.models()
        self.tokenizer = self.models.tokenizer
        synchronous = needs_synchronous(rules)
        self.settings = replace(settings, at_once=options.batch_size, synchronous=synchronous)
        self._turns = list(dict.fromkeys(map(self.turn, rules)))
        self._engine: Engine | None = None
        self._open = ""

    def __enter__(self) -> EnginePair:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine that runs."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    # What is decoded

    def check(self, rule: Rule, options: Settings) -> list[str]:
        """Refuse heads of another pair and rules that the engine cannot execute; returns accepted mismatches."""
        if self.turn(rule) == RULES:
            check_served(rule, SimpleNamespace(**self.settings.speculation(self.settings.drafter)))
        found: list[str] = []
        for head in heads_of(rule):
            found += check_head(head, self.models.fingerprints, self.facts(options), options.accept_mismatch)
        return found

    def encode(self, prompts: Sequence[Prompt], options: Settings) -> list[EncodedPrompt]:
        """Ids of every prompt; refuses the first that is empty or does not fit both models' context."""
        encoded = self.models.encode(prompts, options.max_new_tokens, options.chat)
        rows = [prompt.input_ids for prompt in encoded]
        context = needed_context(rows, options.max_new_tokens, options.num_draft_tokens)
        self.settings = replace(self.settings, context=context)
        return encoded

    def group(
        self, encoded: Sequence[EncodedPrompt], options: Settings, sort: bool
    ) -> list[list[EncodedPrompt]]:
        """All prompts at once, of very many so many at once; the engine has its own way of filling a step."""
        return handed_over(encoded, options)

    def turn(self, rule: Rule) -> str:
        """Which engine a rule is decoded in."""
        if isinstance(rule, EnginesOwn):
            return OWN + rule.method
        return ALONE.get(rule.name, RULES)

    def decode_batch(
        self,
        batch: Sequence[EncodedPrompt],
        rule: Rule,
        options: Settings,
        stop: StopDrafting | None,
        number: int,
        token_log: Any = None,
    ) -> BatchResult:
        """Hand the prompts over together; see `Decoder`."""
        turn = self.turn(rule)
        engine = self._running(turn)
        if turn == RULES:
            engine.use(rule, _spec(rule), options.max_request_loss)
        each = [self._sampling(options, seed) for seed in request_seeds(options, number, len(batch))]
        served = engine.generate([prompt.input_ids for prompt in batch], each)
        stats = served.stats
        if options.max_request_loss is not None:
            stats = replace(stats, spent=torch.tensor(served.loss, dtype=torch.float64))
        if served.refused.get("fault"):
            raise InputError(
                f"rule {_spec(rule)}: {served.refused['fault']} blocks had logits that are NaN or infinite; check the "
                "weights and dtype"
            )
        ran = engine.facts() | ({"served_lossless": served.refused} if served.refused else {})
        return BatchResult(served.tokens, stats, served.seconds, ran)

    def _sampling(self, options: Settings, seed: int | None) -> Sampling:
        return Sampling(
            options.max_new_tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            seed,
            tuple(options.stop_strings) or self.models.stop_strings,
        )

    def _running(self, turn: str) -> Engine:
        """The engine of a turn, opened if need be.

        Raises:
            NotRunError: it cannot be run, or does not start, and is not the one of the rules.
        """
        if self._engine is not None and self._open == turn:
            return self._engine
        self.close()
        if not turn.startswith(OWN):
            self._engine, self._open = Engine(self._opened(turn)), turn
            self._engine.eos_ids = self.models.eos_ids  # the verifier's, also for its drafter
            return self._engine
        opened = self._opened(turn)
        reason = _known_not_to_run(turn.removeprefix(OWN), opened)
        if reason is not None:
            raise NotRunError(reason)
        try:
            self._engine, self._open = Engine(opened), turn
        except InputError as error:
            raise NotRunError(str(error)) from error
        return self._engine

    def _opened(self, turn: str) -> EngineSettings:
        """How to open the engine of a turn."""
        settings = self.settings
        if turn == RULES:
            return replace(settings, deferral={"rule": "lossless"})
        if turn == ALONE["drafter_only"]:
            assert settings.drafter is not None
            return replace(settings, verifier=settings.drafter, drafter=None, role="drafter")
        method = BASELINES.get(turn.removeprefix(OWN)) if turn.startswith(OWN) else None
        if method is None:
            return replace(settings, drafter=None)
        return replace(settings, rejection=method)

    # What is said about it

    def text(self, ids: Sequence[int]) -> str:
        """Emitted ids as text, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def facts(self, options: Settings) -> dict[str, Any]:
        """Conditions of a certificate besides the weights."""
        return {
            "engine": self.models.engine,
            "vocab_size": self.models.vocab_size,
            "dtype": dict.fromkeys(("drafter", "verifier"), self.models.dtype),
            "quantization": self.models.quantization,
            "temperature": options.temperature,
        }

    def record(self, options: Settings) -> dict[str, Any]:
        """Facts that decide outputs beside rules, prompts and settings; the model runner is one."""
        runner = planned_runner(self._opened(self._turns[0])) if self._turns else None
        return {
            "pair": self.models.fingerprints,
            "models": self.models.contents,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "conditions": self.facts(options) | {"device": self.models.device, "runner": runner},
        }

    def sizes(self) -> dict[str, Any]:
        """Type and size of the models, by role."""
        return self.models.sizes


def _spec(rule: Rule) -> str:
    """A rule as text, for the plug-in's messages."""
    return rule.name if rule.dial is None else f"{rule.name}:{rule.dial.parameter}={rule.dial_value:g}"


def _known_not_to_run(name: str, settings: EngineSettings) -> str | None:
    """Why this release or runner of vLLM cannot run one of its own ways of decoding; None where it may."""
    from typing import get_args

    from vllm.config import speculative

    method = BASELINES[name]
    if method is None or method == "standard":
        return None
    known: Mapping[str, Any] = vars(speculative)
    methods = get_args(known.get("RejectionSampleMethod"))
    import vllm

    if methods and method not in methods:
        return (
            f"vllm {vllm.__version__} has no rejection_sample_method {method!r}; it has {', '.join(methods)}"
        )
    runner = planned_runner(replace(settings, rejection="standard"))
    if runner == "V1":
        return (
            f"the V1 runner of vllm {vllm.__version__} ignores rejection_sample_method {method!r}; V2 has it"
        )
    return None
