"""The texts a pair is trained on, each with an id and a content hash, and a held-out share for its gate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deferral_train.errors import InputError
from deferral_train.pairs.corpora import Document, part_of, stdlib_sources
from deferral_train.pairs.prompts import Prompt, format_of, read_lines, read_prompts
from deferral_train.pairs.scratch.train_config import PairText

BLOCK = 4000  # characters of consecutive lines that make one text of a plain file
HELD_OUT = {"heldout": 0.03, "pair": 0.97}


@dataclass(frozen=True)
class TrainingText:
    """``train`` and ``heldout`` texts; of parallel text each has its other side in ``reference``."""

    train: Sequence[Prompt]
    heldout: Sequence[Prompt]


def load_training_text(text: PairText) -> TrainingText:
    """Read the texts of ``text``.

    Raises:
        InputError: files missing or unreadable, or nothing left to train on or to hold out.
    """
    if text.files == ("stdlib",):
        parts = stdlib_sources()
        train, heldout = _as_prompts(parts["pair"]), _as_prompts(parts["validation"])
    elif text.heldout:
        train = _read(text.files, text.targets, text.start, text.limit)
        heldout = _read(text.heldout, text.heldout_targets, 0, None)
    else:
        texts = _read(text.files, text.targets, text.start, text.limit)
        train = [item for item in texts if part_of(item.id, HELD_OUT) == "pair"]
        heldout = [item for item in texts if part_of(item.id, HELD_OUT) == "heldout"]
    if not train or not heldout:
        raise InputError(
            f"text: {len(train)} texts to train on, {len(heldout)} held out; give more, or name text.heldout"
        )
    return TrainingText(train, heldout)


def _as_prompts(documents: Iterable[Document]) -> list[Prompt]:
    return [Prompt(document.id, document.text) for document in documents]


def _read(files: Sequence[str], targets: Sequence[str], start: int, limit: int | None) -> list[Prompt]:
    texts: list[Prompt] = []
    for i, file in enumerate(files):
        if targets:
            texts += read_prompts(file, "text", reference_path=targets[i], start=start, limit=limit)
        elif format_of(file) != "text":
            texts += read_prompts(file, start=start, limit=limit)
        else:
            texts += _blocks(file, start, limit)
    return [text for text in texts if text.prompt.strip() and (not targets or (text.reference or "").strip())]


def _blocks(file: str, start: int, limit: int | None) -> list[Prompt]:
    """Consecutive lines gathered to texts of about ``BLOCK`` characters; ids are ``file#first line``."""
    lines = read_lines(file)[start : None if limit is None else start + limit]
    blocks: list[Prompt] = []
    gathered: list[str] = []
    size, first = 0, start + 1
    for number, line in enumerate(lines, start + 1):
        gathered.append(line)
        size += len(line) + 1
        if size >= BLOCK or number == start + len(lines):
            blocks.append(Prompt(f"{Path(file).name}#{first}", "\n".join(gathered) + "\n"))
            gathered, size, first = [], 0, number + 1
    return blocks
