"""vLLM in this process, for a pair of checkpoints: open it, put a rule in force, hand it prompts.

The one way in which commands start an engine: `decode --engine vllm`, corpora and labels of `collect --engine vllm`.
Imports vLLM only when an engine is opened.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deferral_train.decoding.stats import GenerationStats
from deferral_train.errors import InputError
from deferral_train.rules import Rule
from deferral_train.rules.summary import PREVIOUS_TOKENS
from deferral_train.serving.checks import check_rule
from deferral_train.serving.config import KEY, ServingConfig
from deferral_train.serving.counters import REFUSALS
from deferral_train.serving.models import ServedModels, import_vllm
from deferral_train.serving.served_stats import ServedBlocks, Steps, drafter_stats, served_stats

CPU_KV_GIB = 1.0  # by itself the engine takes nine tenths of a CPU machine's memory
GIB = 1 << 30
# Tokens before the longest stop string that are looked at: the text of a first token depends on those.
BEFORE_STRING = 8
SILENT = 10.0  # seconds before a bar is shown


@dataclass(frozen=True)
class EngineSettings:
    """How to open vLLM for a pair, or for one model alone.

    Attributes:
        verifier: checkpoint folder or hub id.
        drafter: the same of the small model; None opens an engine without speculation.
        deferral: the plug-in's settings as ``additional_config`` takes them; None opens an engine without our plug-in.
        num_draft_tokens: drafted tokens of a block.
        device: auto, or the kind of device that this vLLM was built for; a CPU runs eagerly, without compiling.
        dtype: auto (as stored; on a CPU half becomes float32), float32, float16 or bfloat16, of both models.
        seed: of the engine; requests may have their own.
        context: most tokens of a prompt and its answer, cut to what both models were made for; None for just that.
        at_once: most requests that run at once; None for vLLM's default.
        kv_gib: memory of the KV cache in GiB; None for `CPU_KV_GIB`, or VLLM_CPU_KVCACHE_SPACE, on a CPU, and for
            vLLM's own share of a GPU.
        prefix_caching: keep prompts' keys and values for later requests; off, so that times do not depend on the order.
        synchronous: schedule a step only when the last has ended, which heads with memory need on V1.
        rejection: vLLM's ``rejection_sample_method``; other than standard without our plug-in alone.
        speculative: further keys of vLLM's ``speculative_config``.
        options: further arguments of ``vllm.LLM``.
        role: which model of the pair it is that runs alone.
    """

    verifier: str
    drafter: str | None = None
    deferral: Mapping[str, Any] | None = None
    num_draft_tokens: int = 5
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    context: int | None = None
    at_once: int | None = None
    kv_gib: float | None = None
    prefix_caching: bool = False
    synchronous: bool = False
    rejection: str = "standard"
    speculative: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    role: str = "verifier"

    def __post_init__(self) -> None:
        for name in ("num_draft_tokens", "context", "at_once", "kv_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} is {value}; give a number above 0")
        if self.deferral is not None and self.drafter is None:
            raise InputError(
                "drafter is not given: the plug-in decides about drafts; name one, or leave deferral out"
            )

    def models(self) -> ServedModels:
        """The checkpoints, found and checked."""
        return ServedModels.find(self.verifier, self.drafter, self.device, self.dtype, self.role)

    def speculation(self, drafter: str | None) -> dict[str, Any]:
        """vLLM's ``speculative_config`` with this drafter."""
        found: dict[str, Any] = {
            "model": drafter,
            "method": "draft_model",
            "num_speculative_tokens": self.num_draft_tokens,
            "draft_sample_method": "probabilistic",
        }
        if self.rejection != "standard":
            found["rejection_sample_method"] = self.rejection
        return found | dict(self.speculative)


@dataclass(frozen=True)
class Sampling:
    """How a request is sampled and where it ends; the fields mean what they mean in ``decode``.

    Attributes:
        extra: options of the plug-in for this request, by the names of ``vllm_xargs``: ``deferral_lossless``,
            ``deferral_dial``, ``deferral_max_request_loss``, ``deferral_name``.
        ignore_eos: write on to ``max_new_tokens``.
        allowed: ids from this one on are never written; None where the model has no padding columns.
        repetition_penalty: None for the checkpoint's own, as ``decode`` has it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_strings: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    allowed: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Served:
    """Texts, counts and times of requests that an engine served, in their order.

    Attributes:
        tokens: emitted ids of each request, end of sequence included.
        texts: decoded, special tokens left out.
        finish: why each ended: "stop" or "length".
        stats: counts, calls and token origins; row i belongs to request i.
        loss: estimated loss of each request's kept tokens, in units of the rule's estimate; 0 where no rule decided.
        refused: blocks, or requests, that the plug-in served lossless although a rule is in force, by reason.
        seconds: wall clock from the first request handed over to the last token.
    """

    tokens: list[list[int]]
    texts: list[str]
    finish: list[str]
    stats: GenerationStats
    loss: list[float]
    seconds: float
    refused: dict[str, int] = field(default_factory=dict)


@contextmanager
def open_engine(settings: EngineSettings) -> Iterator[Engine]:
    """An engine in this process, ended at the end.

    Raises:
        InputError: settings that the engine cannot give, or does not start with, in one line.
        MissingExtraError: vLLM is not installed.
    """
    engine = Engine(settings)
    try:
        yield engine
    finally:
        engine.close()


class Engine:
    """A running engine; use :func:`open_engine`.

    Attributes:
        settings: as given. models: the checkpoints. tokenizer: the verifier's.
        eos_ids: ids that end a text, as in ``decode``.
        version: of vLLM. runner: "V1" or "V2". device: cpu, cuda, .. dtype: of both models.
        context: most tokens of a prompt and its answer.
        llm: vLLM's own object.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        vllm = import_vllm()
        self.models = settings.models()
        self.tokenizer, self.eos_ids = self.models.tokenizer, self.models.eos_ids
        self.version, self.device, self.dtype = vllm.__version__, self.models.device, self.models.dtype
        self._served: dict[str, list[Any]] = {}
        self._number = 0
        self.llm = _started(vllm.LLM, _arguments(settings, self.models))
        self.runner = _runner(self.config)
        self.context = int(self.config.model_config.max_model_len)
        if settings.deferral is not None:
            self.seam.watch = self._noted

    @property
    def config(self) -> Any:
        """vLLM's configuration of this engine."""
        return self.llm.llm_engine.vllm_config

    @property
    def seam(self) -> Any:
        """The plug-in in this engine's worker."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.rejection_sampler.seam

    @property
    def name(self) -> str:
        """The engine as certificates name it."""
        return self.models.engine

    def facts(self) -> dict[str, Any]:
        """Engine and version, model runner, device, number format, scheduling."""
        return {
            "engine": self.name,
            "runner": self.runner,
            "device": self.device,
            "dtype": self.dtype,
            "asynchronous": bool(self.config.scheduler_config.async_scheduling),
            "eager": bool(self.config.model_config.enforce_eager),
        }

    def use(self, rule: Rule, spec: str, max_request_loss: float | None = None) -> None:
        """Put a rule in force for all requests from here on, those that ask for less excepted.

        Args:
            spec: the rule as text, for messages.
            max_request_loss: limit on each request's estimated loss.

        Raises:
            InputError: a rule that this engine cannot execute.
        """
        limit = None if rule.is_lossless else max_request_loss
        config = ServingConfig(rule=spec, max_request_loss=limit)
        check_rule(rule, config, self.config)
        seam = self.seam
        seam.drain()
        seam.adopt(config, rule)
        # A server would serve other temperatures than the certificate's lossless; here the caller has checked the head.
        seam.requests.certified = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> Served:
        """Hand over all prompts at once and wait for the last.

        Args:
            prompts: token ids.
            sampling: for all, or one for each.

        Raises:
            InputError: options that the engine does not grant.
        """
        before = self._refused()
        steps, passes, seconds = self._all_at_once(prompts, sampling)
        names = list(steps)
        if self.settings.deferral is not None:
            self.seam.drain()
        rows = [steps[name] for name in names]
        blocks = [ServedBlocks.of(self._served.pop(name, [])) for name in names]
        if self.settings.role == "drafter":
            stats = drafter_stats(rows, passes)
        else:
            stats = served_stats(rows, blocks, self.settings.num_draft_tokens, passes)
        return Served(
            [row.tokens for row in rows],
            [self.tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows],
            [row.finish for row in rows],
            stats,
            [sum(block.loss) for block in blocks],
            seconds,
            {
                reason: count - before[reason]
                for reason, count in self._refused().items()
                if count > before[reason]
            },
        )

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> list[list[int]]:
        """As :meth:`generate`, the emitted ids alone, counting nothing."""
        steps, _, _ = self._all_at_once(prompts, sampling)
        return [own.tokens for own in steps.values()]

    def _all_at_once(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> tuple[dict[str, Steps], int, float]:
        """The steps of each request by name, of the engine how many, and seconds."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise InputError(
                f"sampling has {len(each)} entries for {len(prompts)} prompts; give one for each"
            )
        names = [str(self._number + place) for place in range(len(prompts))]
        self._number += len(prompts)
        self._served.clear()
        params = [self._params(one) for one in each]  # made outside of the time that is measured
        began = time.perf_counter()
        steps, passes = self._run(names, prompts, params, each)
        return steps, passes, time.perf_counter() - began

    def _refused(self) -> dict[str, int]:
        """The plug-in's counters of what it served lossless, by reason; empty without it."""
        if self.settings.deferral is None:
            return {}
        return {reason: int(self.seam.counters.get(f"refused_{reason}")) for reason in REFUSALS}

    def _params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        penalty = sampling.repetition_penalty
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            detokenize=False,
            allowed_token_ids=None if sampling.allowed is None else list(range(sampling.allowed)),
            repetition_penalty=self.models.repetition_penalty if penalty is None else penalty,
            ignore_eos=True,  # the ends of a text are the same as in decode, not what the engine finds out itself
            stop_token_ids=[] if sampling.ignore_eos else list(self.eos_ids),
            extra_args=dict(sampling.extra) or None,
            output_kind=RequestOutputKind.DELTA,
        )

    def _run(
        self,
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        sampling: Sequence[Sampling],
    ) -> tuple[dict[str, Steps], int]:
        """Steps of every request, and of the engine how many."""
        from tqdm import tqdm  # comes with transformers
        from vllm.exceptions import VLLMValidationError

        engine = self.llm.llm_engine
        steps = {name: Steps() for name in names}
        strings = {name: one.stop_strings for name, one in zip(names, sampling) if one.stop_strings}
        try:
            for name, ids, one in zip(names, prompts, params):
                engine.add_request(name, {"prompt_token_ids": list(ids)}, one)
        except (VLLMValidationError, ValueError) as error:
            engine.abort_request(list(names), internal=False)
            raise InputError(f"the engine refuses a request: {error}") from error
        passes = 0
        bar = tqdm(total=len(names), desc="vllm", unit="text", delay=SILENT, dynamic_ncols=True, leave=False)
        with bar:
            while engine.has_unfinished_requests():
                outputs = engine.step()
                passes += bool(outputs)
                for output in outputs:
                    own = steps[output.request_id]
                    before = len(own.tokens)
                    own.take(output.outputs[0])
                    ended = output.request_id in strings and self._ends_at_string(
                        own, before, strings[output.request_id]
                    )
                    if ended and not output.finished:
                        engine.abort_request([output.request_id], internal=False)
                    bar.update(int(ended or output.finished))
        return steps, passes

    def _ends_at_string(self, steps: Steps, before: int, strings: Sequence[str]) -> bool:
        """Look for stop strings in tokens from place ``before`` on; ends the text with the token that completes one.

        The engine itself would cut the step there and not say what of its block was accepted.
        """
        window = max(len(string.encode()) for string in strings) + BEFORE_STRING
        for end in range(before + 1, len(steps.tokens) + 1):
            text = self.tokenizer.decode(steps.tokens[max(0, end - window) : end])
            if any(string in text for string in strings):
                if self.settings.drafter is not None:
                    steps.infer(self.settings.num_draft_tokens)
                steps.cut(end)
                steps.finish = "stop"
                return True
        return False

    def _noted(self, names: Sequence[str], outcome: Any) -> None:
        """Called by the plug-in with every step's verdicts; the engine's names are ours and a random part."""
        for place, name in enumerate(names):
            self._served.setdefault(name.rpartition("-")[0], []).append((outcome, place))

    def close(self) -> None:
        """End the engine and free its memory.

        Raises:
            RuntimeError: a rule was put in force and never consulted, see `Seam.check_consulted`.
        """
        llm, self.llm = self.llm, None
        if llm is None:
            return
        try:
            llm.llm_engine.engine_core.shutdown()
        finally:
            del llm
            gc.collect()
            _free_device(self.device)


def needs_synchronous(rules: Sequence[Rule]) -> bool:
    """True where a rule reads previous tokens, which V1 hands over in time only without asynchronous scheduling."""
    return any(rule.needs & set(PREVIOUS_TOKENS) for rule in rules)


def planned_runner(settings: EngineSettings) -> str:
    """The model runner, "V1" or "V2", that vLLM would choose; loads no weights."""
    import_vllm()
    from vllm.engine.arg_utils import EngineArgs

    arguments = _arguments(settings, settings.models())
    return _runner(_started(lambda **given: EngineArgs(**given).create_engine_config(), arguments))


def _runner(vllm_config: Any) -> str:
    return "V2" if vllm_config.use_v2_model_runner else "V1"


def _arguments(settings: EngineSettings, models: ServedModels) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    cpu = models.device == "cpu"
    found: dict[str, Any] = {
        "model": str(models.verifier.folder),
        "dtype": models.dtype,
        "seed": settings.seed,
        "enforce_eager": cpu,
        "use_tqdm_on_load": False,
        "enable_prefix_caching": settings.prefix_caching,
    }
    if models.drafter is not None:
        found["per_request_spec_decode_metrics"] = "detailed"
        found["speculative_config"] = settings.speculation(str(models.drafter.folder))
    if settings.deferral is not None:
        found["additional_config"] = {KEY: dict(settings.deferral)}
    kv = settings.kv_gib
    if kv is None and cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        kv = CPU_KV_GIB
    context = settings.context
    if context is not None and models.room is not None:
        context = min(context, models.room)
    given = {
        "max_model_len": context,
        "max_num_seqs": settings.at_once,
        "kv_cache_memory_bytes": None if kv is None else int(kv * GIB),
        "async_scheduling": False if settings.synchronous else None,
    }
    return (
        found | {name: value for name, value in given.items() if value is not None} | dict(settings.options)
    )


def _started(start: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The result of ``start`` with these arguments; whatever vLLM raises is one line.

    Raises:
        InputError: naming the reason.
    """
    import vllm

    try:
        return start(**arguments)
    except InputError:
        raise
    except Exception as error:
        # Wrong combinations, too little memory, no kernel for a shape: each its own class.
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise InputError(f"vllm {vllm.__version__} does not start: {reason}") from error


def _free_device(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
