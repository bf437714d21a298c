"""The checkpoints that an engine is opened for, and the vLLM that is installed here: what is known before it starts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deferral_train.errors import InputError, MissingExtraError
from deferral_train.pairs.checkpoint import Checkpoint, find_checkpoint, one_line_errors
from deferral_train.pairs.encode import EncodedPrompt, encode_prompts
from deferral_train.pairs.fingerprint import tokenizer_fingerprint
from deferral_train.pairs.load import DTYPES, check_same_tokenizer, eos_ids, load_tokenizer
from deferral_train.pairs.prompts import Prompt

IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # verdicts are read, and rules put in force, where they are made
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # unless the user says otherwise
# Of a generation config: what `generate`, and so `decode` without an engine, would do to logits.
PROCESSORS = (
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "min_length", "min_new_tokens", "sequence_bias", "guidance_scale", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "watermarking_config",
)  # fmt: skip


@dataclass(frozen=True)
class ServedModels:
    """Checkpoints as an engine takes them.

    Attributes:
        verifier, drafter: where they lie; without a drafter nothing is drafted.
        configs: transformers' configurations by role.
        generation: transformers' generation config of the verifier; None where it has none.
        tokenizer: the verifier's. device: the kind that this vLLM was built for. dtype: of both models.
        engine: name and version, as certificates name it.
    """

    verifier: Checkpoint
    drafter: Checkpoint | None
    configs: dict[str, Any]
    generation: Any
    tokenizer: Any
    device: str
    dtype: str
    engine: str

    @classmethod
    def find(
        cls,
        verifier: str,
        drafter: str | None,
        device: str = "auto",
        dtype: str = "auto",
        role: str = "verifier",
    ) -> ServedModels:
        """The checkpoints with these names; a hub id is fetched.

        Args:
            role: what the first is called in messages.

        Raises:
            InputError: not a checkpoint, none that the engine serves, unlike tokenizers, no such device.
            MissingExtraError: vLLM is not installed.
        """
        version, place = import_vllm().__version__, check_device(device)
        found, config = _checkpoint(verifier, role)
        small = None if drafter is None else _checkpoint(drafter, "drafter")
        tokenizer = load_tokenizer(found, role)
        configs = {"verifier": config}
        if small is not None:
            check_same_tokenizer(load_tokenizer(small[0], "drafter"), tokenizer)
            configs["drafter"] = small[1]
        return cls(
            found,
            None if small is None else small[0],
            configs,
            _generation(found, role),
            tokenizer,
            place,
            _dtype(dtype, config, place),
            f"vllm {version}",
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as in ``decode``."""
        return eos_ids(self.generation, self.tokenizer)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a text by the verifier's own configuration."""
        own = getattr(self.generation, "stop_strings", None) or ()
        return (own,) if isinstance(own, str) else tuple(own)

    @property
    def repetition_penalty(self) -> float:
        """Of the verifier's own configuration; 1 for none."""
        return float(getattr(self.generation, "repetition_penalty", None) or 1.0)

    @property
    def room(self) -> int | None:
        """Most tokens of a text that both models were made for; None where neither says."""
        rooms = [_room(config) for config in self.configs.values()]
        return min((room for room in rooms if room is not None), default=None)

    @property
    def vocab_size(self) -> int:
        """Ids that both models can emit and the tokenizer knows."""
        sizes = [config.get_text_config().vocab_size for config in self.configs.values()]
        return min(len(self.tokenizer), *sizes)

    @property
    def quantization(self) -> str | None:
        """Of the verifier, by name."""
        found = getattr(self.configs["verifier"], "quantization_config", None)
        method = (
            found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        )
        return None if method is None else str(method)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """By role."""
        pair = {"drafter": self.drafter, "verifier": self.verifier}
        return {role: found for role, found in pair.items() if found is not None}

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Of models and tokenizer, as heads record them."""
        found: dict[str, Any] = {role: one.fingerprint() for role, one in self.checkpoints.items()}
        return found | {"tokenizer": tokenizer_fingerprint(self.tokenizer)}

    @cached_property
    def contents(self) -> dict[str, str]:
        """Content keys of the files that decide what each model does."""
        return {role: found.content for role, found in self.checkpoints.items()}

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Type and number of parameters by role, from the files' headers."""
        return {
            role: {"model_type": self.configs[role].model_type, "parameters": _parameters(found)}
            for role, found in self.checkpoints.items()
        }

    def encode(
        self, prompts: Sequence[Prompt], max_new_tokens: int, chat: str = "auto"
    ) -> list[EncodedPrompt]:
        """Ids of every prompt as ``decode`` makes them, see :func:`encode_within`."""
        return encode_within(self.tokenizer, prompts, chat, max_new_tokens, self.room)


def encode_within(
    tokenizer: Any, prompts: Sequence[Prompt], chat: str, max_new_tokens: int, room: int | None
) -> list[EncodedPrompt]:
    """Ids of every prompt.

    Args:
        room: most tokens of a prompt and its answer; None for any.

    Raises:
        InputError: naming the first prompt that is empty or leaves no room for its answer.
    """
    encoded = encode_prompts(tokenizer, prompts, chat=chat)
    if encoded.skipped:
        raise InputError(f"{encoded.skipped[0]}; remove it or give it a text")
    for prompt in encoded.kept:
        length = len(prompt.input_ids)
        if room is not None and length + max_new_tokens > room:
            raise InputError(
                f"prompt {prompt.id}: {length} tokens and room for {max_new_tokens} more exceed the context of {room}; "
                "shorten it or lower max_new_tokens"
            )
    return encoded.kept


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
        if (error.name or "vllm").split(".")[0] != "vllm":
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


def needed_context(prompts: Sequence[Sequence[int]], max_new_tokens: int, num_draft_tokens: int) -> int:
    """Context that takes every prompt and its answer, and two blocks of drafts behind it.

    V1 drafts for nobody in a step in which one request has not room for a block more; the drafter then lacks the keys
    and values of that step's tokens in all requests, and drafts badly from there on.
    """
    return max(map(len, prompts)) + max_new_tokens + 2 * num_draft_tokens + 2


def _checkpoint(name: str, role: str) -> tuple[Checkpoint, Any]:
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


def _generation(checkpoint: Checkpoint, role: str) -> Any:
    """The checkpoint's generation config.

    Raises:
        InputError: it asks for something that the engine would not do.
    """
    if not (checkpoint.folder / "generation_config.json").is_file():
        return None
    with one_line_errors(role, checkpoint.folder, "generation_config.json"):
        from transformers import GenerationConfig

        config = GenerationConfig.from_pretrained(checkpoint.folder)
    asked = config.to_diff_dict()
    for name in PROCESSORS:
        if asked.get(name):
            raise InputError(
                f"{role}: generation_config.json asks for {name}={asked[name]!r}, which the engine does not do as "
                "`generate` does; remove it there, or decode without --engine"
            )
    return config


def _room(config: Any) -> int | None:
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    return room if isinstance(room, int) and room > 0 else None


def _dtype(asked: str, config: Any, device: str) -> str:
    """Number format as ``decode`` chooses it: vLLM's own auto would round float32."""
    if asked != "auto":
        if asked not in DTYPES:
            raise InputError(f"dtype={asked!r}: use auto, {', '.join(DTYPES)}")
        return asked
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return "float32" if device == "cpu" and stored in ("float16", "bfloat16") else stored


def _parameters(checkpoint: Checkpoint) -> int:
    from safetensors import safe_open

    total = 0
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
