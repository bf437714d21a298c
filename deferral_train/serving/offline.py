"""Traces of a corpus through the engine: `deferral-train collect --engine vllm`.

The same seam as live traffic with every request logged under its prompt's own id. A row is a drafted position that
emitted a token, so that the first token of an answer and bonus tokens have none. A shard holds whole prompts, and a run
that was interrupted goes on behind the last that is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deferral_train.errors import InputError
from deferral_train.pairs.checkpoint import contents_of, find_checkpoint, need
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import load_tokenizer
from deferral_train.pairs.prompts import Prompt
from deferral_train.provenance import hash_of
from deferral_train.serving.config import PREFIX
from deferral_train.serving.models import needed_context
from deferral_train.serving.resume import finished_part
from deferral_train.serving.running import EngineSettings, Sampling, open_engine
from deferral_train.traces.folder import open_folder
from deferral_train.traces.manifest import read_header

ROWS_PER_SHARD = 16_384  # what an interruption may cost
SETTINGS = ("max_new_tokens", "num_draft_tokens", "max_prompt_tokens", "seed", "chat", "template")


def collect_with_engine(config: Any, out: str, prompts: Sequence[Prompt]) -> int:
    """Run the pair in vLLM over prompts and log what it emits; returns the number of prompts logged.

    Args:
        config: a ``CollectConfig`` with ``prefixes`` cascade; its device ``cpu`` runs eagerly, without compiling.
        out: trace folder; one that an interrupted run left is continued with the prompts that are not in it.

    Raises:
        InputError: settings that the engine cannot give, by name.
        MissingExtraError: vLLM is not installed.
    """
    _check(config)
    need("vllm")
    before = finished_part(open_folder(out))
    settings = {name: getattr(config, name) for name in SETTINGS}
    settings["contents"] = hash_of(
        {
            "prompts": hash_of([[prompt.id, prompt.prompt] for prompt in prompts]),
            **contents_of({"drafter": config.drafter, "verifier": config.verifier}, config.rule),
        }
    )
    done: frozenset[str] = frozenset()
    if before is not None:
        _check_settings(out, before[0].settings, settings)
        done = frozenset(before[0].prompt_ids)
    # The limit is no part of the key: a folder of the first prompts goes on with the next ones.
    prompts = [prompt for prompt in prompts[: config.limit] if prompt.id not in done]
    if not prompts:
        return len(done)
    log = {
        "folder": out, "fraction": 1.0, "wait": True, "rows_per_shard": ROWS_PER_SHARD, "top_k": config.log_top_k,
        "hidden": config.hidden == "both", "temperature": config.temperature,
        "max_bytes": config.max_bytes or 1 << 62, "names": True, "resume": True,
        "settings": settings,
    }  # fmt: skip
    new = config.max_new_tokens or 128
    tokenizer = load_tokenizer(find_checkpoint(config.verifier, "verifier"), "verifier")
    encoded = encode_prompts(tokenizer, prompts, chat=config.chat, max_prompt_tokens=config.max_prompt_tokens)
    if not encoded.kept:
        return len(done)
    rows = [prompt.input_ids for prompt in encoded.kept]
    opened = EngineSettings(
        config.verifier, config.drafter, {"rule": config.rule, "log": log}, config.num_draft_tokens, config.device,
        config.dtype, config.seed, needed_context(rows, new, config.num_draft_tokens),
    )  # fmt: skip
    with open_engine(opened) as engine:  # the log is closed with it
        names = [{PREFIX + "name": prompt.id} for prompt in encoded.kept]
        engine.generate(rows, [Sampling(new, config.temperature, extra=name) for name in names])
    return len(read_header(open_folder(out)).prompt_ids)


def _check(config: Any) -> None:
    if config.prefixes != "cascade" or config.rule is None:
        raise InputError(
            f"prefixes={config.prefixes!r} with --engine vllm: the engine logs what it emits; "
            "use --prefixes cascade --rule RULE (lossless for the verifier's own text)"
        )
    if config.teacher is not None:
        raise InputError("teacher with --engine vllm: the engine runs the pair alone; leave one of them out")
    if config.hidden not in ("none", "both"):
        raise InputError(f"hidden={config.hidden!r} with --engine vllm: use none or both")


def _check_settings(out: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise InputError(
            f"{out} was collected with other settings: {'; '.join(changed)}; use the same ones to resume, or another "
            "--out"
        )
