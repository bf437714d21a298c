"""The library's database against the library itself, and questions whose queries mean what they say."""

from __future__ import annotations

import ast
import inspect
import random
import re
import sqlite3
import string
from collections import Counter
from pathlib import Path

import pytest

from deferral_train.errors import InputError
from deferral_train.evaluation.sql import RIGHT, judge, same_rows
from deferral_train.questions import build_database, make_questions
from deferral_train.questions.families import HELD_OUT, SEEN
from deferral_train.questions.generate import _piece
from deferral_train.questions.query import AS_ASKED, Condition, Join, Query, Style, write

SIZES = {"pair": 300, "fit": 60, "validation": 60, "calibration": 120, "test": 120, "test_shapes": 20}


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library") / "stdlib.sqlite"
    counts = build_database(path)
    assert counts["modules"] > 300
    assert counts["functions"] > 5000
    return path


@pytest.fixture(scope="module")
def questions(database):
    return make_questions(database, SIZES)


def rows(database: Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_the_database_agrees_with_what_inspect_says_of_a_module(database: Path) -> None:
    """`string` is small and imported here: its functions by inspect, not by ast."""
    found = {name: (arguments, documented) for name, arguments, documented in rows(
        database, "select name, arguments, documented from functions where module = 'string'")}  # fmt: skip
    capwords = inspect.signature(string.capwords).parameters
    assert found["capwords"] == (len(capwords), int(bool(string.capwords.__doc__)))
    methods = {name for name, value in vars(string.Formatter).items() if inspect.isfunction(value)}
    assert methods <= set(found)
    assert rows(
        database, "select methods, lines from classes where module = 'string' and name = 'Formatter'"
    ) == [(len(methods), len(inspect.getsource(string.Formatter).splitlines()))]
    source = inspect.getsource(string)
    assert rows(database, "select lines, classes from modules where name = 'string'") == [
        (source.count("\n") + 1, sum(isinstance(node, ast.ClassDef) for node in ast.parse(source).body))
    ]
    assert ("re",) in rows(database, "select name from imports where module = 'string'")
    packages = "select package from modules where name in ('json', 'json.decoder', 'string') order by name"
    assert rows(database, packages) == [("json",), ("json",), (None,)]


def test_the_same_sources_give_the_same_bytes(database: Path, tmp_path: Path) -> None:
    build_database(tmp_path / "again.sqlite")
    assert (tmp_path / "again.sqlite").read_bytes() == database.read_bytes()


def test_modules_that_later_pythons_have_not_are_left_out(tmp_path: Path) -> None:
    for place in range(100):
        (tmp_path / f"module_{place}.py").write_text("import json\n")
    for name in ("lib2to3/fixes", "asyncio"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("imp.py", "telnetlib.py", "lib2to3/fixes/fix_dict.py", "asyncio/imp.py"):
        (tmp_path / name).write_text("def one(): pass\n")
    build_database(tmp_path / "out.sqlite", tmp_path)
    assert rows(tmp_path / "out.sqlite", "select distinct module from functions") == [("asyncio.imp",)]


def test_a_python_without_sources_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(
        InputError, match="has 1 readable modules, needs 100; use a Python that ships its sources"
    ) as error:
        build_database(tmp_path / "out.sqlite", tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.sqlite").exists()


def test_every_reference_answers_and_is_right_by_its_own_measure(database: Path, questions) -> None:
    for part, prompts in questions.parts.items():
        references = [prompt.reference for prompt in prompts]
        if part == "pair":  # some of its names are invented
            continue
        assert judge(database, references, references) == [RIGHT] * len(prompts), part
        for prompt in prompts:
            answer = rows(database, prompt.reference)
            assert any(value not in (None, 0) for row in answer for value in row), prompt


def test_parts_share_no_name_and_only_the_last_has_other_families(questions) -> None:
    owner: dict[str, str] = {}
    for part, prompts in questions.parts.items():
        families = {prompt.id.partition("/")[0] for prompt in prompts}
        assert families == set(HELD_OUT if part == "test_shapes" else SEEN), part
        real = [prompt for prompt in prompts if part != "pair"]
        for prompt in real:
            for name in re.findall(r"'([^']*)'", prompt.reference):
                assert name in prompt.prompt
                belongs = owner.setdefault(name, part.removesuffix("_shapes"))
                assert belongs == part.removesuffix("_shapes"), (name, part)
    asked = [prompt.prompt for prompts in questions.parts.values() for prompt in prompts]
    assert len(asked) == len(set(asked)) or len(set(asked)) > 0.99 * len(asked)


def test_training_questions_of_real_names_share_none_with_other_parts(database, questions) -> None:
    real = {name for (name,) in rows(database, "select name from modules")}
    seen = {n for p in questions.parts["pair"] for n in re.findall(r"'([^']*)'", p.reference)} & real
    asked = {n for part in ("test", "calibration") for p in questions.parts[part]
             for n in re.findall(r"'([^']*)'", p.reference)}  # fmt: skip
    assert seen
    assert not seen & asked


def test_parts_of_invented_names_are_words_or_a_head_and_a_tail_of_two() -> None:
    draw = random.Random(0)
    words = ("handle", "title", "lines")
    found = Counter(_piece(("handle", "title"), ("lines",), draw) for _ in range(2000))
    assert 0.5 < sum(found[word] for word in words) / 2000 < 0.7  # some are glued to a word again
    glued = {one[:i] + other[j:] for one in words for other in words for i in range(1, len(one) + 1)
             for j in range(len(other) + 1)}  # fmt: skip
    assert set(found) <= glued
    assert any(
        "tle" in part and "itle" not in part for part in found
    )  # a piece that no real word has by itself


def test_invented_names_and_numbers_are_the_same_in_question_and_query(database, questions) -> None:
    """Nothing that a query compares with is missing in its question, and most names of the training part are new."""
    tables = ("modules", "imports", "functions", "classes")
    known = {name for table in tables for (name,) in rows(database, f"select name from {table}")}
    known |= {name for (name,) in rows(database, "select package from modules")}
    invented = []
    for prompt in questions.parts["pair"]:
        names = re.findall(r"'([^']*)'", prompt.reference)
        assert set(names) == set(re.findall(r"'([^']*)'", prompt.prompt)), prompt
        spoken, written = (
            set(re.findall(r"(?<![\w'.])\d{2,}", text)) for text in (prompt.prompt, prompt.reference)
        )
        assert written == spoken, prompt
        invented.append(not known.issuperset(names))
    assert 0.7 < sum(invented) / len(invented) <= 1.0


def test_conditions_stand_mostly_as_asked_and_else_in_a_drawn_order() -> None:
    query = Query(
        ("name",), "functions",
        (Condition("module", "=", "m"), Condition("lines", ">", 7), Condition("arguments", "between", 2, 4)),
    )  # fmt: skip
    draw = random.Random(0)
    orders: dict[tuple[str, ...], int] = {}
    for _ in range(3000):
        text = write(query, Style.drawn(draw), draw).lower()
        order = tuple(sorted(("module", "lines", "arguments"), key=text.index))
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 6
    asked = orders["module", "lines", "arguments"] / 3000
    expected = AS_ASKED + (1 - AS_ASKED) / 6
    assert asked == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 3000) ** 0.5)


def test_ordered_questions_have_one_answer(database: Path, questions) -> None:
    """Without its limit, no value of the order stands on both sides of the limit or twice before it."""
    limited = [
        p for part in ("test", "test_shapes") for p in questions.parts[part] if "limit" in p.reference.lower()
    ]
    assert limited
    for prompt in limited:
        found = re.fullmatch(
            r"(?is)select (\S+)\sfrom (.*)\sorder by (\S+) (\w+)\slimit (\d+);?", prompt.reference
        )
        _, source, column, direction, limit = found.groups()
        values = [
            v for (v,) in rows(database, f"select {column} from {source} order by {column} {direction}")
        ]
        kept = values[: int(limit) + 1]
        assert len(set(kept)) == len(kept), prompt


def test_the_constant_answer_is_the_most_frequent_one(database: Path, questions) -> None:
    answers = [rows(database, p.reference) for p in questions.parts["test"]]
    share = max(sum(same_rows(one, other, ordered=False) for other in answers) for one in answers) / len(
        answers
    )
    assert questions.constant["test"] == pytest.approx(share, abs=1.5 / len(answers))


def test_the_same_seed_gives_the_same_questions_and_another_seed_others(database, questions) -> None:
    again = make_questions(database, {"test": SIZES["test"]})
    assert again.parts["test"] == questions.parts["test"]
    other = make_questions(database, {"test": SIZES["test"]}, seed=1)
    assert other.parts["test"] != questions.parts["test"]


def test_every_way_of_writing_means_the_same(database: Path) -> None:
    asked = [
        Query(("count",), "functions", (Condition("module", "=", "string"), Condition("lines", "between", 3, 20))),
        Query(("name",), "functions", (Condition("modules.package", "=", "json"), Condition("lines", ">", 5)),
              Join("modules", "module", "name")),
        Query(("count",), "classes", (Condition("module", "=", "ast"),), group="methods"),
        Query(("avg lines",), "functions", (Condition("module", "=", "ast"), Condition("documented", "=", 1))),
        Query(("name",), "modules", (Condition("package", "=", "json"),), order="lines", limit=2),
    ]  # fmt: skip
    draw = random.Random(0)
    for query in asked:
        house = write(query, Style())
        written = {write(query, Style.drawn(draw), draw) for _ in range(60)}
        assert len(written) > 15
        assert set(judge(database, sorted(written), [house] * len(written))) == {RIGHT}


def test_one_house_style_is_one_way_of_writing(database: Path) -> None:
    found = make_questions(database, {"test": 60}, style="house").parts["test"]
    assert all(p.reference.startswith("SELECT ") and not p.reference.endswith(";") for p in found)
    with pytest.raises(InputError, match="style='loud': use drawn or house"):
        make_questions(database, {"test": 1}, style="loud")


def test_more_questions_than_there_are_is_one_line(database: Path, monkeypatch) -> None:
    monkeypatch.setattr("deferral_train.questions.generate.MISSES", 1)
    with pytest.raises(InputError, match=r"part test gave .* different questions of 5000; ask for fewer"):
        make_questions(database, {"test": 5000})
