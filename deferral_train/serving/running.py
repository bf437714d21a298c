"""vLLM in this process, for a pair of checkpoints: open it, put a rule in force, hand it prompts.

The one way in which commands start an engine: `decode --engine vllm`, corpora and labels of `collect --engine vllm`.
Imports vLLM only when an engine is opened.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deferral_train.decoding.stats import GenerationStats
from deferral_train.errors import InputError, MissingExtraError
from deferral_train.pairs.checkpoint import find_checkpoint, one_line_errors
from deferral_train.pairs.encode import EncodedPrompt, encode_prompts
from deferral_train.pairs.load import DTYPES, check_same_tokenizer, eos_ids, load_tokenizer
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import Rule
from deferral_train.rules.summary import PREVIOUS_TOKENS
from deferral_train.serving.checks import check_rule
from deferral_train.serving.config import KEY, ServingConfig
from deferral_train.serving.served_stats import ServedBlocks, Steps, served_stats

IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # verdicts are read, and rules put in force, where they are made
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # unless the user says otherwise
CPU_KV_GIB = 1.0  # by itself the engine takes nine tenths of a CPU machine's memory
GIB = 1 << 30
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

    def __post_init__(self) -> None:
        for name in ("num_draft_tokens", "context", "at_once", "kv_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} is {value}; give a number above 0")
        if self.deferral is not None and self.drafter is None:
            raise InputError(
                "drafter is not given: the plug-in decides about drafts; name one, or leave deferral out"
            )


@dataclass(frozen=True)
class Sampling:
    """How a request is sampled and where it ends; the fields mean what they mean in ``decode``.

    Attributes:
        extra: options of the plug-in for this request, by the names of ``vllm_xargs``: ``deferral_lossless``,
            ``deferral_dial``, ``deferral_max_request_loss``, ``deferral_name``.
        ignore_eos: write on to ``max_new_tokens``.
        allowed: ids from this one on are never written; None where the model has no padding columns.
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


@dataclass(frozen=True)
class Served:
    """What the engine gave, in the order of the requests.

    Attributes:
        tokens: emitted ids of each request, end of sequence included.
        texts: decoded, special tokens left out.
        finish: why each ended: "stop" or "length".
        stats: counts, calls and token origins; row i belongs to request i.
        loss: estimated loss of each request's kept tokens, in units of the rule's estimate; 0 where no rule decided.
        seconds: wall clock from the first request handed over to the last token.
    """

    tokens: list[list[int]]
    texts: list[str]
    finish: list[str]
    stats: GenerationStats
    loss: list[float]
    seconds: float


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
        settings: as given. tokenizer: the verifier's. eos_ids: ids that end a text, as in ``decode``.
        version: of vLLM. runner: "V1" or "V2". device: cpu, cuda, .. dtype: of both models.
        context: most tokens of a prompt and its answer.
        llm: vLLM's own object.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        vllm = import_vllm()
        self.version, self.device = vllm.__version__, check_device(settings.device)
        verifier, model = _checkpoint(settings.verifier, "verifier")
        rooms = [_room(model)]
        self.tokenizer = load_tokenizer(verifier, "verifier")
        self.eos_ids = _eos_ids(verifier, self.tokenizer)
        self.dtype = _dtype(settings.dtype, model, self.device)
        given: dict[str, Any] = {"model": str(verifier.folder), "dtype": self.dtype}
        if settings.drafter is not None:
            drafter, small = _checkpoint(settings.drafter, "drafter")
            rooms.append(_room(small))
            check_same_tokenizer(load_tokenizer(drafter, "drafter"), self.tokenizer)
            given["speculative_config"] = self._speculative(str(drafter.folder))
        self._served: dict[str, list[Any]] = {}
        self._number = 0
        self.llm = _started(vllm, given | self._arguments(rooms))
        self.runner = "V2" if self.config.use_v2_model_runner else "V1"
        self.context = int(self.config.model_config.max_model_len)
        if settings.deferral is not None:
            self.seam.watch = self._noted

    def _speculative(self, drafter: str) -> dict[str, Any]:
        found = {
            "model": drafter,
            "method": "draft_model",
            "num_speculative_tokens": self.settings.num_draft_tokens,
            "draft_sample_method": "probabilistic",
        }
        if self.settings.rejection != "standard":
            found["rejection_sample_method"] = self.settings.rejection
        return found | dict(self.settings.speculative)

    def _arguments(self, rooms: Sequence[int | None]) -> dict[str, Any]:
        settings, cpu = self.settings, self.device == "cpu"
        known = [room for room in (*rooms, settings.context) if room is not None]
        found: dict[str, Any] = {
            "seed": settings.seed,
            "enforce_eager": cpu,
            "enable_prefix_caching": settings.prefix_caching,
        }
        if settings.drafter is not None:
            found["per_request_spec_decode_metrics"] = "detailed"
        if settings.deferral is not None:
            found["additional_config"] = {KEY: dict(settings.deferral)}
        kv = settings.kv_gib
        if kv is None and cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            kv = CPU_KV_GIB
        given = {
            "max_model_len": min(known) if settings.context is not None else None,
            "max_num_seqs": settings.at_once,
            "kv_cache_memory_bytes": None if kv is None else int(kv * GIB),
            "async_scheduling": False if settings.synchronous else None,
        }
        return (
            found
            | {name: value for name, value in given.items() if value is not None}
            | dict(settings.options)
        )

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
        return f"vllm {self.version}"

    def facts(self) -> dict[str, Any]:
        """What ran: engine and version, model runner, device, number format, scheduling."""
        return {
            "engine": self.name,
            "runner": self.runner,
            "device": self.device,
            "dtype": self.dtype,
            "asynchronous": bool(self.config.scheduler_config.async_scheduling),
            "eager": bool(self.config.model_config.enforce_eager),
        }

    def encode(
        self, prompts: Sequence[Prompt], max_new_tokens: int, chat: str = "auto"
    ) -> list[EncodedPrompt]:
        """Ids of every prompt as ``decode`` makes them; refuses the first that is empty or does not fit.

        Raises:
            InputError: naming the prompt.
        """
        encoded = encode_prompts(self.tokenizer, prompts, chat=chat)
        if encoded.skipped:
            raise InputError(f"{encoded.skipped[0]}; remove it or give it a text")
        for prompt in encoded.kept:
            if len(prompt.input_ids) + max_new_tokens > self.context:
                raise InputError(
                    f"prompt {prompt.id}: {len(prompt.input_ids)} tokens and room for {max_new_tokens} more exceed the "
                    f"engine's context of {self.context}; shorten it or lower max_new_tokens"
                )
        return encoded.kept

    def use(self, rule: Rule, spec: str, max_request_loss: float | None = None) -> None:
        """Put a rule in force for all requests from here on, those that ask for less excepted.

        Args:
            spec: the rule as text, for messages.
            max_request_loss: limit on each request's estimated loss.

        Raises:
            InputError: a rule that this engine cannot execute.
        """
        check_rule(rule, self.config)
        seam = self.seam
        seam.drain()
        limit = None if rule.is_lossless else max_request_loss
        seam.adopt(ServingConfig(rule=spec, max_request_loss=limit), rule)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> Served:
        """Hand over all prompts at once and wait for the last.

        Args:
            prompts: token ids.
            sampling: for all, or one for each.

        Raises:
            InputError: options that the engine does not grant.
        """
        each, steps, passes, seconds = self._all_at_once(prompts, sampling)
        names = list(steps)
        if self.settings.deferral is not None:
            self.seam.drain()
        for name, one in zip(names, each):
            if one.stop_strings:
                self._cut_at_string(steps[name], one.stop_strings)
        rows = [steps[name] for name in names]
        blocks = [ServedBlocks.of(self._served.pop(name, [])) for name in names]
        stats = served_stats(rows, blocks, self.settings.num_draft_tokens, passes)
        return Served(
            [row.tokens for row in rows],
            [self.tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows],
            [row.finish for row in rows],
            stats,
            [sum(block.loss) for block in blocks],
            seconds,
        )

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> list[list[int]]:
        """As :meth:`generate`, the emitted ids alone, counting nothing."""
        _, steps, _, _ = self._all_at_once(prompts, sampling)
        return [own.tokens for own in steps.values()]

    def _all_at_once(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> tuple[list[Sampling], dict[str, Steps], int, float]:
        """Each request's sampling, its steps by name, of the engine how many, and seconds."""
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
        steps, passes = self._run(names, prompts, params)
        return each, steps, passes, time.perf_counter() - began

    def _params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop_strings) or None,
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop_strings),
            allowed_token_ids=None if sampling.allowed is None else list(range(sampling.allowed)),
            ignore_eos=True,  # the ends of a text are the same as in decode, not what the engine finds out itself
            stop_token_ids=[] if sampling.ignore_eos else list(self.eos_ids),
            extra_args=dict(sampling.extra) or None,
            output_kind=RequestOutputKind.DELTA,
        )

    def _run(
        self, names: Sequence[str], prompts: Sequence[Sequence[int]], params: Sequence[Any]
    ) -> tuple[dict[str, Steps], int]:
        """Steps of every request, and of the engine how many."""
        from tqdm import tqdm  # comes with transformers
        from vllm.exceptions import VLLMValidationError

        engine = self.llm.llm_engine
        steps = {name: Steps() for name in names}
        try:
            for name, ids, one in zip(names, prompts, params):
                engine.add_request(name, {"prompt_token_ids": list(ids)}, one)
        except (VLLMValidationError, ValueError) as error:
            engine.abort_request(list(names), internal=False)
            raise InputError(f"the engine refuses a request: {error}") from error
        passes = 0
        with tqdm(total=len(names), desc="vllm", unit="text", delay=SILENT, dynamic_ncols=True) as bar:
            while engine.has_unfinished_requests():
                outputs = engine.step()
                passes += bool(outputs)
                for output in outputs:
                    steps[output.request_id].take(output.outputs[0])
                    bar.update(int(output.finished))
        return steps, passes

    def _noted(self, names: Sequence[str], outcome: Any) -> None:
        """Called by the plug-in with every step's verdicts; the engine's names are ours and a random part."""
        for place, name in enumerate(names):
            self._served.setdefault(name.rpartition("-")[0], []).append((outcome, place))

    def _cut_at_string(self, steps: Steps, strings: Sequence[str]) -> None:
        """Drop tokens behind the first that completes a stop string: the engine gives a step's tokens whole."""
        if steps.finish != "stop":
            return
        for end in range(1, len(steps.tokens) + 1):
            text = self.tokenizer.decode(steps.tokens[:end])
            if any(string in text for string in strings):
                steps.cut(end)
                return

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


def import_vllm() -> Any:
    """The vllm module, told to run in this process.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.update(IN_PROCESS)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm import LLM  # noqa: F401 - an incomplete installation fails here
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("vllm", ""):
            raise InputError(f"vllm cannot be imported: {error}; install it again") from error
        raise MissingExtraError("vllm", "vllm") from None
    return vllm


def check_device(device: str) -> str:
    """The kind of device that this vLLM was built for.

    Raises:
        InputError: another one is asked for.
    """
    from vllm.platforms import current_platform

    here = str(current_platform.device_type)
    if device not in ("auto", here):
        raise InputError(
            f"device={device!r}: this vLLM runs on {here}; use auto or {here} (CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )
    return here


def needs_synchronous(rules: Sequence[Rule]) -> bool:
    """True where a rule reads previous tokens, which V1 hands over in time only without asynchronous scheduling."""
    return any(rule.needs & set(PREVIOUS_TOKENS) for rule in rules)


def _checkpoint(name: str, role: str) -> tuple[Any, Any]:
    """Where a model lies, and its configuration.

    Raises:
        InputError: an adapter, a GGUF file or an encoder-decoder.
    """
    found = find_checkpoint(name, role)
    if found.adapter is not None or found.gguf is not None:
        kind = "an adapter" if found.adapter is not None else "a GGUF file"
        raise InputError(
            f"{role}: {name} is {kind}, and the engine serves folders of weights; merge or convert it"
        )
    with one_line_errors(role, found.folder, "config.json"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(found.folder)
    if config.is_encoder_decoder:
        raise InputError(f"{role}: {name} is an encoder-decoder, and the plug-in serves decoder-only pairs")
    return found, config


def _room(config: Any) -> int | None:
    """Most tokens of a text that a model was made for; None where its configuration does not say."""
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    return room if isinstance(room, int) and room > 0 else None


def needed_context(prompts: Sequence[Sequence[int]], max_new_tokens: int, num_draft_tokens: int) -> int:
    """Context that takes every prompt and its answer, and a block of drafts behind it."""
    return max(map(len, prompts)) + max_new_tokens + num_draft_tokens + 1


def _dtype(asked: str, config: Any, device: str) -> str:
    """Number format as ``decode`` chooses it: vLLM's own auto would round float32."""
    if asked != "auto":
        if asked not in DTYPES:
            raise InputError(f"dtype={asked!r}: use auto, {', '.join(DTYPES)}")
        return asked
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return "float32" if device == "cpu" and stored in ("float16", "bfloat16") else stored


def _eos_ids(checkpoint: Any, tokenizer: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    path = Path(checkpoint.folder) / "generation_config.json"
    configured = None
    if path.is_file():
        with one_line_errors("verifier", checkpoint.folder, "generation_config.json"):
            configured = GenerationConfig.from_pretrained(checkpoint.folder)
    return eos_ids(configured, tokenizer)


def _started(vllm: Any, arguments: Mapping[str, Any]) -> Any:
    """vLLM's own object; whatever it raises at start is one line.

    Raises:
        InputError: naming the reason.
    """
    try:
        return vllm.LLM(**arguments)
    except InputError:
        raise
    except (
        Exception
    ) as error:  # wrong combinations, too little memory, no kernel for a shape: each its own class
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise InputError(f"vllm {vllm.__version__} does not start: {reason}") from error


def _free_device(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
