"""Rows of published benchmarks, in whatever file or data set they come, as rows of prompts.

- ``mbpp``: ``google-research-datasets/mbpp``, both its subsets: ``text`` (``prompt`` in the sanitized one), ``code``
  and ``test_list``, with ``test_setup_code`` or ``test_imports``. The prompt is the one of Austin et al. 2021, the
  reference the program, and the tests go with it for the metric ``python_tests``.
- ``spec_bench``: ``question.jsonl`` of Spec-Bench (as of MT-Bench): ``question_id``, ``category``, ``turns`` and
  sometimes ``reference``, a list by turn.
- ``speed_bench``: SPEED-Bench once its external texts are filled in (``prepare_data.py`` of specdec_bench writes
  ``test.parquet``): the same fields.

Of several turns the first is the prompt: the next ones answer what a model said to it. Ids are ``category/question``,
so that ``breakdowns`` by id are by category.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deferral_train.errors import InputError

Row = Mapping[str, Any]
# What SPEED-Bench's hub files hold where a text may not be passed on.
NOT_FILLED_IN = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}\n"
)


def shape_of(format: str | None) -> Callable[[Row, str], Row]:
    """The function from a row as the format has it, and its place in words, to a row of prompts: itself for most."""
    return CONTAINED.get(format or "", _as_it_is)


def _as_it_is(row: Row, where: str) -> Row:
    return row


def mbpp_row(row: Row, where: str) -> Row:
    """A programming task: prompt, program and tests.

    Raises:
        InputError: a field that is missing or of another kind, with the row.
    """
    task = _text(row, "text" if "text" in row else "prompt", where, "mbpp")
    tests = _texts(row, "test_list", where, "mbpp")
    setup = [
        str(row.get("test_setup_code") or ""),
        *_texts({"": row.get("test_imports") or []}, "", where, "mbpp"),
    ]
    return {
        "id": f"mbpp/{row['task_id']}" if row.get("task_id") is not None else None,
        "prompt": MBPP_PROMPT.format(task=task, tests="\n".join(tests)),
        "reference": _text(row, "code", where, "mbpp").replace("\r\n", "\n"),
        "tests": "\n".join([*filter(None, setup), *tests, ""]),
    }


def turns_row(row: Row, where: str) -> Row:
    """The first turn of a question of Spec-Bench, MT-Bench or SPEED-Bench.

    Raises:
        InputError: a field that is missing or of another kind, or a text that was not filled in, with the row.
    """
    turns = _texts(row, "turns", where, "spec_bench or speed_bench")
    if not turns:
        raise InputError(f"{where}: turns is empty; mend the row")
    if turns[0].startswith(NOT_FILLED_IN):
        raise InputError(
            f"{where}: SPEED-Bench's text is not filled in; run prepare_data.py of specdec_bench, which fetches it, "
            "and give the test.parquet that it writes"
        )
    found: dict[str, Any] = {"prompt": turns[0]}
    if row.get("question_id") is not None:
        found["id"] = f"{row.get('category') or 'none'}/{row['question_id']}"
    references = row.get("reference")
    if isinstance(references, Sequence) and not isinstance(references, str) and len(references):
        references = references[0]
    if isinstance(references, str):
        found["reference"] = references
    return found


# Format -> what makes a row of prompts of its rows.
CONTAINED: dict[str, Callable[[Row, str], Row]] = {
    "mbpp": mbpp_row,
    "spec_bench": turns_row,
    "speed_bench": turns_row,
}


def _text(row: Row, field: str, where: str, format: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field {field!r} holds no text; rows of {format} do, give another prompt_format"
        )
    return value


def _texts(row: Row, field: str, where: str, format: str) -> list[str]:
    value: Any = row.get(field)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(one, str) for one in value)
    ):
        raise InputError(
            f"{where}: field {field!r} is no list of texts; rows of {format} have one, give another prompt_format"
        )
    return list(value)
