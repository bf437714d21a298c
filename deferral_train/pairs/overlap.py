"""Refuses prompts that a pair was trained on, where a head is to be fitted, tuned or judged on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.pairs.prompts import Prompt

FILE = "training_ids.json"
LONG_LINE = 30  # characters; shorter lines repeat in unrelated texts


def write_training_ids(path: str | Path, texts: Iterable[Prompt]) -> None:
    """Record ids and content hashes of the texts a pair was trained on, and of each longer line of plain texts.

    The lines are for prompts that are read one a line from a file that was trained on in larger blocks.
    """
    texts = list(texts)
    content = {content_hash(text.prompt, text.reference) for text in texts}
    for text in texts:
        if text.reference is None:
            content |= {
                content_hash(line) for line in text.prompt.splitlines() if len(line.strip()) >= LONG_LINE
            }
    record = {"schema_version": 1, "ids": [text.id for text in texts], "content": sorted(content)}
    provenance.write_json(path, record)


def read_training_ids(path: str | Path) -> dict[str, Any]:
    """The record of :func:`write_training_ids`; ``path`` is the file or the folder of the trained pair."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: no readable record of training ids ({error}); name the trained pair's"
        ) from error
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), list) for key in ("ids", "content")
    ):
        raise InputError(f"{path}: not a record of training ids; it needs the lists ids and content")
    return record


def find_overlap(training_ids: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[str]:
    """Ids of prompts that the pair has seen: same id, a window (``file#line``) of a seen file, same text."""
    ids, content = set(training_ids["ids"]), set(training_ids["content"])
    return [
        prompt.id
        for prompt in prompts
        if prompt.id in ids
        or prompt.id.rpartition("#")[0] in ids
        or content_hash(prompt.prompt, prompt.reference) in content
    ]


def check_no_overlap(training_ids: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that the pair was trained on.

    Raises:
        InputError: names the count and the first of them.
    """
    seen = find_overlap(training_ids, prompts)
    if seen:
        raise InputError(
            f"{len(seen)} of {len(prompts)} prompts were in the pair's training text, first "
            f"{', '.join(seen[:3])}; use other prompts (or give different texts different ids)"
        )


def content_hash(prompt: str, reference: str | None = None) -> str:
    """Hash of a text regardless of white space; a prompt and its reference count as one text."""
    words = " ".join(f"{prompt} {reference or ''}".split())
    return hashlib.sha256(words.encode()).hexdigest()[:16]
