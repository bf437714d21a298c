"""Traces of a corpus through the engine: `deferral-train collect --engine vllm`.

The same seam as live traffic with every request logged; afterwards the trace's prompts get the corpus' own ids. A row
is a drafted position that emitted a token, so that the first token of an answer and bonus tokens have none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deferral_train.errors import InputError, MissingExtraError
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces.folder import open_folder
from deferral_train.traces.manifest import HEADER, read_header, write_header

ROWS_PER_SHARD = 65_536


def collect_with_engine(config: Any, out: str, prompts: Sequence[Prompt]) -> int:
    """Run the pair in vLLM over prompts and log what it emits; returns the number of prompts logged.

    Args:
        config: a ``CollectConfig`` with ``prefixes`` cascade; its device ``cpu`` runs eagerly, without compiling.
        out: trace folder; a new one, since nothing is resumed.

    Raises:
        InputError: settings that the engine cannot give, by name.
        MissingExtraError: vLLM is not installed.
    """
    _check(config, out)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the log is closed before this returns
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise MissingExtraError("vllm", "vllm") from None
    log = {
        "folder": out, "fraction": 1.0, "wait": True, "rows_per_shard": ROWS_PER_SHARD, "top_k": config.log_top_k,
        "hidden": config.hidden == "both", "temperature": config.temperature,
        "max_bytes": config.max_bytes or 1 << 62,
    }  # fmt: skip
    speculative = {
        "model": config.drafter,
        "method": "draft_model",
        "num_speculative_tokens": config.num_draft_tokens,
        "draft_sample_method": "probabilistic",
    }
    llm = LLM(
        model=config.verifier,
        dtype=config.dtype,
        seed=config.seed,
        speculative_config=speculative,
        additional_config={"deferral": {"rule": config.rule, "log": log}},
        enforce_eager=config.device == "cpu",
    )
    try:
        encoded = encode_prompts(
            llm.get_tokenizer(), prompts, chat=config.chat, max_prompt_tokens=config.max_prompt_tokens
        )
        params = SamplingParams(temperature=config.temperature, max_tokens=config.max_new_tokens or 128)
        rows: list[Any] = [{"prompt_token_ids": list(prompt.input_ids)} for prompt in encoded.kept]
        outputs = llm.generate(rows, params)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return _rename(
        out, {_number(output.request_id): prompt.id for output, prompt in zip(outputs, encoded.kept)}
    )


def _check(config: Any, out: str) -> None:
    if config.prefixes != "cascade" or config.rule is None:
        raise InputError(
            f"prefixes={config.prefixes!r} with --engine vllm: the engine logs what it emits; "
            "use --prefixes cascade --rule RULE (lossless for the verifier's own text)"
        )
    if config.teacher is not None:
        raise InputError("teacher with --engine vllm: the engine runs the pair alone; leave one of them out")
    if config.hidden not in ("none", "both"):
        raise InputError(f"hidden={config.hidden!r} with --engine vllm: use none or both")
    if open_folder(out).size(HEADER) is not None:
        raise InputError(f"{out} holds traces already, and --engine vllm resumes nothing; name a new folder")


def _number(request: str) -> str:
    """The engine numbers requests and puts a random part behind: `12-a1b2c3`."""
    return request.split("-")[0]


def _rename(out: str, names: Mapping[str, str]) -> int:
    folder = open_folder(out)
    manifest = read_header(folder)
    ids = tuple(names.get(_number(request), request) for request in manifest.prompt_ids)
    write_header(folder, replace(manifest, prompt_ids=ids))
    return len(ids)
