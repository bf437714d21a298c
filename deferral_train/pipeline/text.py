"""The text stage: prompts in four parts that do not overlap, with each other or with what the pair learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.pairs.corpora import code_prompts, stdlib_sources
from deferral_train.pairs.overlap import FILE, check_no_overlap, content_hash, read_training_ids
from deferral_train.pairs.prompts import Prompt, read_prompts, write_prompts
from deferral_train.pipeline.ask import ask_questions, part_path
from deferral_train.pipeline.config import PARTS, TextConfig


def prepare_text(config: TextConfig, run: Path, seed: int = 0) -> dict[str, Any]:
    """Write ``data/PART.jsonl`` for every part; returns prompts a part.

    Raises:
        InputError: a part is empty, or two parts share an id or a text.
    """
    if config.questions is not None:
        return ask_questions(config.questions, run, seed)
    parts = _stdlib_parts(config) if config.stdlib else _file_parts(config)
    refuse_shared(parts)
    for part, prompts in parts.items():
        write_prompts(part_path(run, part), prompts)
    return {part: len(prompts) for part, prompts in parts.items()}


def read_part(run: Path, part: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a part, at most ``limit``."""
    return read_prompts(part_path(run, part), limit=limit)


def refuse_shared(parts: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse parts that share a prompt's text: a head judged on what it learned from proves nothing."""
    owner: dict[str, str] = {}
    for part, prompts in parts.items():
        for prompt in prompts:
            digest = content_hash(prompt.prompt)  # as fit compares traces
            if owner.setdefault(digest, part) != part:
                raise InputError(
                    f"text: prompt {prompt.id!r} of part {part} is also in part {owner[digest]}; "
                    "parts must not overlap, remove it from one"
                )


def refuse_seen(pair_folder: Path, run: Path) -> int:
    """Refuse prompts that the pair was trained on, where the pair recorded its training ids; returns how many
    training texts were compared with (0 where there is no record).
    """
    if not (pair_folder / FILE).is_file():
        return 0
    seen = read_training_ids(pair_folder)
    for part in PARTS:
        # Training ids know nothing of the parts that this run's ids carry.
        prompts = [replace(p, id=p.id.removeprefix(f"{part}/")) for p in read_part(run, part)]
        check_no_overlap(seen, prompts)
    return len(seen["ids"])


def _stdlib_parts(config: TextConfig) -> dict[str, list[Prompt]]:
    sources = stdlib_sources()
    sizes = (config.prompt_characters, config.reference_characters)
    return {part: code_prompts(sources[part], getattr(config, part).limit, *sizes) for part in PARTS}


def _file_parts(config: TextConfig) -> dict[str, list[Prompt]]:
    parts = {}
    for part in PARTS:
        source = asdict(getattr(config, part))
        prompts = read_prompts(source.pop("path"), **source)
        # Two parts of one file differ in their rows; ids carry the part so that they stay unique in the run.
        parts[part] = [replace(prompt, id=f"{part}/{prompt.id}") for prompt in prompts]
    return parts
