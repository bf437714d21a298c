"""Execution accuracy: what counts as the same answer, and that no query gets away with anything."""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from pathlib import Path

import pytest

from deferral_train.errors import InputError
from deferral_train.evaluation.quality import check_metric, per_prompt
from deferral_train.evaluation.sql import Limits, SqlRunner, is_ordered, judge, reasons, same_rows

ROWS = [("a", 1, 0.1), ("b", 2, 0.2), ("b", 2, 0.2), ("c", None, 1e16)]
BLOB = "select length(replace(hex(zeroblob(400000000)),'00','ab'))"


def make_database(path: Path) -> Path:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("create table t (name text, n integer, x real)")
        connection.executemany("insert into t values (?, ?, ?)", ROWS)
    connection.close()
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    return make_database(tmp_path_factory.mktemp("sql") / "t.sqlite")


@pytest.mark.parametrize(
    ("text", "reference", "verdict"),
    [
        ("SELECT count(1) AS n FROM t AS a;", "select count(*) from t", "right"),
        ("select name from t where n == 2", "SELECT name FROM t WHERE n = 2", "right"),
        ("select name from t where n = 2 limit 1", "select name from t where n = 2", "wrong rows"),
        ("select name from t order by name desc", "select name from t", "right"),
        ("select name from t order by name desc", "select name from t order by name", "wrong rows"),
        ("select name, n from t", "select name from t", "wrong rows"),
        ("select sum(x) from t where n < 3", "select 0.1 + 0.2 + 0.2", "right"),
        ("select 1.0", "select 1", "right"),
        ("select '1'", "select 1", "wrong rows"),
        ("select 1.00001", "select 1", "wrong rows"),
        ("select null", "select 0", "wrong rows"),
        ("select nam from t", "select name from t", "no such name"),
        ("selec name", "select name from t", "syntax"),
        ("", "select name from t", "no query"),
        ("select 1; select 1", "select 1", "several queries"),
        ("the answer is 4", "select 4", "syntax"),
    ],
)
def test_verdicts(database: Path, text: str, reference: str, verdict: str) -> None:
    assert judge(database, [text], [reference]) == [verdict]
    assert list(per_prompt(f"sql:{database}", [text], [reference])) == [float(verdict == "right")]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (BLOB, "not allowed"),
        ("attach '/etc/passwd' as other", "not allowed"),
        ("pragma writable_schema = 1", "not allowed"),
        ("select * from pragma_table_info('t')", "not allowed"),
        ("delete from t", "not allowed"),
        ("insert into t values (1, 2, 3)", "not allowed"),
        ("create temp table u (x)", "not allowed"),
        ("drop table t", "not allowed"),
        ("begin", "not allowed"),
        ("vacuum into 'copy.sqlite'", "other error"),
        ("select load_extension('x')", "not allowed"),
        ("select randomblob(100)", "not allowed"),
        ("select readfile('/etc/passwd')", "no such name"),
        (
            "with recursive r(n) as (select 1 union all select n + 1 from r) select count(*) from r",
            "not allowed",
        ),
        ("select count(*) from " + ", ".join(f"t t{number}" for number in range(30)), "time"),
        ("select t1.n from " + ", ".join(f"t t{number}" for number in range(8)), "too many rows"),
        ("select " + "1+" * 30000 + "1", "too long"),
        ("select 1 \0", "other error"),
        ("select '\ud800'", "other error"),
    ],
)
def test_hostile_queries_are_stopped_counted_and_followed_by_honest_ones(
    database: Path, query: str, reason: str
) -> None:
    before = database.read_bytes()
    with SqlRunner(database) as runner:
        answer = runner.run(query)
        assert (answer.rows, answer.reason) == (None, reason)
        # One that was not asked before, so that the process has to answer.
        honest = f"select count(*) + 0 * {zlib.crc32(query.encode('utf-8', 'replace'))} from t"
        assert runner.run(honest).rows == [[4]]
    assert database.read_bytes() == before
    assert reasons(judge(database, [query, "select 1"], ["select 1", "select 1"])) == {reason: 1}


def test_one_long_instruction_is_killed_and_the_next_query_runs(database: Path, monkeypatch) -> None:
    """With every limit of SQLite's own lifted, the process outside still ends it."""
    from deferral_train.evaluation import sql

    worker = Path(sql.__file__).with_name("sql_worker.py").read_text()
    loose = database.with_name("sql_worker.py")
    loose.write_text(
        worker.replace("self.connection.set_authorizer(_authorize)", "").replace(
            "1_000_000,", "2_000_000_000,"
        )
    )
    monkeypatch.setattr(sql, "__file__", str(loose.with_name("sql.py")))
    limits = Limits(seconds=1.0, memory=4 << 30)
    with SqlRunner(database, limits) as runner:
        assert runner.run("select count(*) from t").rows == [[4]]
        begun = time.monotonic()
        assert runner.run(BLOB).reason == "time"
        assert time.monotonic() - begun < 5
        assert runner.run("select max(n) from t").rows == [[2]]
    with SqlRunner(database, Limits(seconds=20, memory=300 << 20)) as runner:
        assert runner.run(BLOB).reason == "memory"
        assert runner.run("select min(n) from t").rows == [[1]]


def test_a_process_that_dies_is_replaced(database: Path) -> None:
    with SqlRunner(database) as runner:
        assert runner.run("select 101").rows == [[101]]
        assert runner._process is not None
        runner._process.kill()
        runner._process.wait()
        assert runner.run("select 102").reason == "memory"
        assert runner.run("select 102").rows == [[102]]


def test_answers_are_those_of_the_database_as_it_is(tmp_path: Path) -> None:
    """The same query again is not run again, but a changed file is."""
    path = make_database(tmp_path / "changing.sqlite")
    query = "select count(*) from t"
    assert judge(path, [query], ["select 4"]) == ["right"]
    with SqlRunner(path) as runner:
        assert runner.run(query).rows == [[4]]
        assert runner._process is None
    connection = sqlite3.connect(path)
    with connection:
        connection.executemany("insert into t values (?, ?, ?)", ROWS * 300)
    connection.close()
    assert judge(path, [query], ["select 1204"]) == ["right"]


@pytest.mark.parametrize(
    "name", ["with space.sqlite", "what?mode=rwc&x=.sqlite", "a#b.sqlite", "100%25.sqlite", "é.sqlite"]
)
def test_odd_paths_are_read_and_nothing_beside_them(tmp_path: Path, name: str) -> None:
    path = make_database(tmp_path / name)
    assert judge(path, ["select count(*) from t"], ["select 4"]) == ["right"]
    assert os.listdir(tmp_path) == [name]


def test_what_is_no_database_is_refused_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no database")
    with pytest.raises(InputError, match="not a SQLite database"):
        check_metric(f"sql:{text}")
    with pytest.raises(InputError, match="cannot be read"):
        check_metric(f"sql:{tmp_path / 'absent'}")
    with pytest.raises(InputError, match="cannot be read"):
        check_metric(f"sql:{tmp_path}")
    assert not (tmp_path / "absent").exists()


def test_a_reference_that_cannot_be_run_is_named(database: Path) -> None:
    with pytest.raises(InputError, match=r"reference 'select q from t' .* no such column"):
        judge(database, ["select 1"], ["select q from t"])


def test_rows_match_as_multisets_with_close_floats() -> None:
    near = [(1, 0.3), (1, 0.1 + 0.2 + 1e-8), (2, 0.5)]
    assert same_rows([(2, 0.5), (1, 0.1 + 0.2), (1, 0.3 + 1e-8)], near, ordered=False)
    assert not same_rows([(2, 0.5), (1, 0.3), (1, 0.3)], near, ordered=False)
    assert not same_rows([(1, 0.5), (1, 0.3), (2, 0.3 + 1e-8)], near, ordered=False)
    assert same_rows([(2**60,)], [(2**60,)], ordered=True)
    assert not same_rows([(2**60,)], [(2**60 + 1,)], ordered=True)
    assert same_rows([(None, "x")], [(None, "x")], ordered=True)


def test_order_is_the_querys_own() -> None:
    assert is_ordered("SELECT a FROM t ORDER  BY a")
    assert not is_ordered("select a from (select a from t order by a)")
    assert not is_ordered("select 'order by' from t")
    assert is_ordered("select ')' from t order by 1")


def test_decode_and_choose_take_the_metric(database: Path, tmp_path: Path, capsys) -> None:
    """As the commands name it: scored outputs, and the reasons beside the mean."""
    from deferral_train.evaluation.outputs import score_outputs

    folder = tmp_path / "decode"
    folder.mkdir()
    texts = {"lossless": "select 4", "opt:alpha=0.2": "select absent"}
    rows = [
        {
            "rule": rule,
            "id": f"p{n}",
            "repetition": 0,
            "tokens": [1],
            "text": text,
            "reference": "select count(*) from t",
        }
        for rule, text in texts.items()
        for n in range(3)
    ]
    (folder / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"rules": {rule: {"quality": {}} for rule in texts}}))
    metric = f"sql:{database}"
    summary = score_outputs(folder, [metric], None, [])  # type: ignore[arg-type]  # no likelihood is asked for
    assert summary["rules"]["lossless"]["quality"][metric] == 1.0
    assert summary["rules"]["opt:alpha=0.2"]["quality"][metric] == 0.0
    assert summary["rules"]["opt:alpha=0.2"]["wrong"][metric] == {"no such name": 3}
