"""Prompt files of published benchmarks, in the form in which they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

from deferral_train.errors import InputError
from deferral_train.pairs.prompts import Prompt, read_prompts, write_prompts

SPEC_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Rewrite it."]},
    {"question_id": 101, "category": "math", "turns": ["2 + 2?"], "reference": ["4", "unused"]},
    {"question_id": 161, "category": "translation", "turns": ["Auf Englisch: ja"]},
]
SPEED_BENCH = [
    {
        "question_id": "coding_7",
        "category": "coding",
        "sub_category": "python",
        "turns": ["Mend this.", "And this."],
        "source": "livecodebench/code_generation_lite",
        "src_id": "7",
        "difficulty": "hard",
    },
    {
        "question_id": "rag_1",
        "category": "rag",
        "sub_category": "qa",
        "turns": ["Answer."],
        "source": "nvidia/ChatRAG-Bench",
        "src_id": "1",
        "difficulty": "low",
    },
]
MBPP_FULL = {
    "task_id": 11,
    "text": "Write a function to remove a character.",
    "code": "def remove(s):\r\n    return s[1:]",
    "test_list": ['assert remove("ab") == "b"', 'assert remove("b") == ""'],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 2,
    "prompt": "Write a function to find the shared elements.",
    "code": "def shared(a, b):\n    return tuple(set(a) & set(b))",
    "test_imports": ["import math"],
    "test_list": ["assert shared((1, 2), (2, 3)) == (2,)"],
}


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_spec_bench_questions_are_first_turns_by_category(tmp_path):
    found = read_prompts(jsonl(tmp_path / "question.jsonl", SPEC_BENCH), "spec_bench")
    assert found == [
        Prompt("writing/81", "Write a post."),
        Prompt("math/101", "2 + 2?", "4"),
        Prompt("translation/161", "Auf Englisch: ja"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_speed_bench_is_read_once_its_texts_are_filled_in(kind, tmp_path):
    path = tmp_path / f"test.{kind}"
    if kind == "jsonl":
        jsonl(path, SPEED_BENCH)
    else:
        pandas.DataFrame(SPEED_BENCH).to_parquet(path)
    found = read_prompts(path, "speed_bench", template="Q: {prompt}", limit=1)
    assert found == [Prompt("coding/coding_7", "Q: Mend this.")]


def test_speed_bench_as_the_hub_holds_it_is_refused_with_the_remedy(tmp_path):
    row = SPEED_BENCH[0] | {
        "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH\n\n{q}"]
    }
    with pytest.raises(InputError, match=r"row 1: SPEED-Bench's text is not filled in; run prepare_data.py"):
        read_prompts(jsonl(tmp_path / "test.jsonl", [row]), "speed_bench")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_mbpp_brings_its_prompt_program_and_tests(kind, tmp_path):
    path = tmp_path / f"test.{kind}"
    jsonl(path, [MBPP_FULL]) if kind == "jsonl" else pandas.DataFrame([MBPP_FULL]).to_parquet(path)
    (found,) = read_prompts(path, "mbpp")
    tests = 'assert remove("ab") == "b"\nassert remove("b") == ""\n'
    assert found.id == "mbpp/11"
    assert found.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to remove a character. "
        f"Your code should pass these tests:\n\n{tests}"
    )
    assert (found.reference, found.tests) == ("def remove(s):\n    return s[1:]", tests)
    write_prompts(tmp_path / "kept.jsonl", [found])  # as a run keeps them
    assert read_prompts(tmp_path / "kept.jsonl") == [found]


def test_the_sanitized_subset_has_other_fields(tmp_path):
    (found,) = read_prompts(jsonl(tmp_path / "test.jsonl", [MBPP_SANITIZED]), "mbpp")
    assert found.tests == "import math\nassert shared((1, 2), (2, 3)) == (2,)\n"
    assert "here is your task: Write a function to find the shared elements. Your code" in found.prompt


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        ("spec_bench", {"question_id": 1, "prompt": "x"}, "'turns' is no list of texts"),
        ("spec_bench", {"turns": "x"}, "'turns' is no list of texts"),
        ("spec_bench", {"turns": []}, "turns is empty"),
        ("speed_bench", {"turns": [1]}, "'turns' is no list of texts"),
        ("mbpp", {"question": "x"}, "'prompt' holds no text"),
        ("mbpp", {"text": "x", "code": "y"}, "'test_list' is no list of texts"),
        ("mbpp", {"text": "x", "test_list": ["assert x"]}, "'code' holds no text"),
    ],
)
def test_rows_of_another_form_are_named(format, row, said, tmp_path):
    with pytest.raises(InputError, match=f"row 1: (field )?{said}"):
        read_prompts(jsonl(tmp_path / "rows.jsonl", [row]), format)


def test_a_missing_file_is_named_whatever_its_rows(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "question.jsonl", "spec_bench")
