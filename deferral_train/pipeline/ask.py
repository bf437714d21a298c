"""The stages that make a database of the standard library and ask questions about it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deferral_train.evaluation.sql import PREFIX
from deferral_train.pairs.prompts import write_prompts
from deferral_train.pairs.scratch.train_config import PairConfig, PairText
from deferral_train.pipeline.config import QuestionsConfig
from deferral_train.questions import build_database, make_questions
from deferral_train.questions.database import FILE

FOLDER = "data"
SHAPES = "test_shapes"


def part_path(run: Path, part: str) -> Path:
    """The prompts file of a part."""
    return run / FOLDER / f"{part}.jsonl"


def database_path(run: Path) -> Path:
    """The database of a run that asks questions."""
    return run / FOLDER / FILE


def execution_accuracy(run: Path) -> str:
    """The metric that runs queries on the run's own database."""
    return f"{PREFIX}{database_path(run)}"


def prepare_database(run: Path) -> dict[str, int]:
    """Write the database; returns rows by table."""
    return build_database(database_path(run))


def ask_questions(config: QuestionsConfig, run: Path, seed: int) -> dict[str, Any]:
    """Write ``data/PART.jsonl`` for every part, also for the pair's own; returns questions a part, and of the test part
    what share one constant answer gets right.
    """
    settings = asdict(config)
    style = settings.pop("style")
    found = make_questions(database_path(run), settings, seed, style)
    for part, prompts in found.parts.items():
        write_prompts(part_path(run, part), prompts)
    return {
        **{part: len(prompts) for part, prompts in found.parts.items()},
        "constant_answer": found.constant,
        "left_out": found.left_out,
    }


def taught(config: PairConfig, run: Path) -> PairConfig:
    """The pair's config with the run's own questions as its text."""
    heldout = (str(part_path(run, "validation")),)
    text = PairText(files=(str(part_path(run, "pair")),), heldout=heldout, answers=True)
    return replace(config, text=text)
