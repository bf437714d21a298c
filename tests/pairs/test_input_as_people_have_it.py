"""Files as programs and people write them: byte order marks, containers, long cells, nulls, numbers, nested fields."""

import bz2
import gzip
import json
import lzma
from decimal import Decimal

import pandas
import pyarrow.parquet
import pytest

from deferral_train.errors import InputError
from deferral_train.pairs.prompts import Prompt, read_lines, read_prompts, write_prompts
from deferral_train.pairs.scratch.train_config import PairText
from deferral_train.pairs.scratch.training_text import load_training_text

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
CONTENT = {
    "jsonl": '{"prompt": "ä one", "reference": "r1"}\r\n\r\n{"prompt": "two", "reference": "r2"}\r\n',
    "csv": 'prompt,reference\r\n"ä one",r1\r\n"two","r2"\r\n',
    "tsv": "prompt\treference\nä one\tr1\ntwo\tr2\n",
    "txt": "ä one\r\ntwo",
}


def read(folder, rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(path, **options)


@pytest.mark.parametrize("container", PACK)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", CONTENT)
def test_marks_and_containers_change_nothing(kind, encoding, container, tmp_path):
    path = tmp_path / f"asked.{kind}{container}"
    path.write_bytes(PACK[container](CONTENT[kind].encode(encoding)))
    found = read_prompts(path)
    assert [p.prompt for p in found] == ["ä one", "two"]
    assert [p.id for p in found] == ["asked:1", "asked:2"]
    if kind != "txt":
        assert [p.reference for p in found] == ["r1", "r2"]


@pytest.mark.parametrize("container", PACK)
def test_marks_in_parallel_text_training_text_and_joined_files(container, tmp_path):
    lines = tmp_path / f"train.en{container}"
    lines.write_bytes(PACK[container]("eins\nzwei\n".encode("utf-8-sig")))
    assert read_lines(lines) == ["eins", "zwei"]
    pairs = read_prompts(lines, reference_path=lines)
    assert [(p.prompt, p.reference) for p in pairs] == [("eins", "eins"), ("zwei", "zwei")]
    table = tmp_path / f"rows.jsonl{container}"
    row = '{"text": "some words"}\n'.encode("utf-8-sig")
    table.write_bytes(PACK[container](row) + PACK[container](row))
    assert [p.prompt for p in read_prompts(table)] == ["some words"] * 2
    text = load_training_text(PairText(files=(str(table),), heldout=(str(lines),)))
    assert [p.prompt for p in text.train] == ["some words"] * 2
    assert text.heldout[0].prompt == "eins\nzwei\n"


@pytest.mark.parametrize("container", [c for c in PACK if c])
def test_written_prompts_are_what_their_name_says(container, tmp_path):
    prompts = [Prompt("a", "x\ny", "ü"), Prompt("b", "", None)]
    write_prompts(tmp_path / f"p.jsonl{container}", prompts)
    assert read_prompts(tmp_path / f"p.jsonl{container}") == prompts


@pytest.mark.parametrize("container", [c for c in PACK if c])
@pytest.mark.parametrize("damage", ["cut", "plain", "noise"])
def test_damaged_containers_are_one_line(container, damage, tmp_path):
    whole = PACK[container]("\n".join(f"line {i * i}" for i in range(3000)).encode())
    path = tmp_path / f"lines.txt{container}"
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "plain": b"plain text", "noise": whole[:40] + b"x" * 90}[damage]
    )
    with pytest.raises(InputError, match="damaged or cut short") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_cells_of_any_size(tmp_path):
    long = "word " * 60_000  # 300,000 characters; csv's own limit is 131,072
    for kind, separator in (("csv", ","), ("tsv", "\t")):
        (tmp_path / f"a.{kind}").write_text(f'prompt{separator}reference\n"{long}"{separator}"{long}\n"\n')
        (prompt,) = read_prompts(tmp_path / f"a.{kind}")
        assert (prompt.prompt, prompt.reference) == (long, long + "\n")


def test_nulls_and_numbers_in_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    rows = {
        "id": pandas.array([7, None, 9], dtype="Int64"),
        "question": ["one", None, "three"],
        "answer": pandas.array([42, None, -3], dtype="Int64"),
        "score": [0.5, None, 2.0],
        "turns": [[{"content": "hi"}], [], None],
    }
    pandas.DataFrame(rows).to_parquet(path)
    found = read_prompts(path)
    assert [p.id for p in found] == ["7", "p:2", "9"]
    assert [p.prompt for p in found] == ["one", "", "three"]
    assert [p.reference for p in found] == ["42", None, "-3"]
    assert [p.reference for p in read_prompts(path, reference_field="score")] == ["0.5", None, "2.0"]
    assert [p.prompt for p in read_prompts(path, prompt_field="turns.0.content")] == ["hi", "", ""]
    with pytest.raises(InputError, match="'score' is float, needs text"):
        read_prompts(path, prompt_field="score")


def test_nested_fields_and_lists(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "answers": {"text": ["a", "b"], "start": [1, 2]}},
        {"messages": [], "answers": {"text": [], "start": []}},
        {"messages": None, "answers": None},
    ]
    named = {"prompt_field": "messages.0.content", "reference_field": "answers.text.0"}
    found = read(tmp_path, rows, **named)
    assert [(p.prompt, p.reference) for p in found] == [("hi", "a"), ("", None), ("", None)]
    assert read(tmp_path, rows[:1], **named | {"id_field": "messages.0.role"})[0].id == "user"
    for wrong in (
        "messages.1.content",
        "messages.x.content",
        "messages.-1.content",
        "messages.0.content.0",
        "a.b",
    ):
        with pytest.raises(InputError, match="correct prompt_field"):
            read(tmp_path, rows[:1], prompt_field=wrong)
    with pytest.raises(InputError, match=r"'answers.text' is list.*such as answers.text.0"):
        read(tmp_path, rows[:1], prompt_field="messages.0.content", reference_field="answers.text")
    dotted = [{"a.b": "whole", "a": {"b": "nested"}}]
    assert read(tmp_path, dotted, prompt_field="a.b")[0].prompt == "whole"


def test_a_field_that_could_be_another_is_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"source and text could each.*prompt_field"):
        read(tmp_path, [{"source": "wikipedia", "text": "A river."}])
    with pytest.raises(InputError, match="input and instruction"):
        read(tmp_path, [{"instruction": "Translate.", "input": "a river", "output": "ein Fluss"}])
    with pytest.raises(InputError, match=r"target and output could each.*reference_field"):
        read(tmp_path, [{"prompt": "x", "target": "y", "output": "z"}])
    assert (
        read(tmp_path, [{"source": "wikipedia", "text": "A river."}], prompt_field="text")[0].prompt
        == "A river."
    )
    kept = read(tmp_path, [{"prompt": "p", "source": "s", "text": "t", "answer": "a", "output": "o"}])
    assert (kept[0].prompt, kept[0].reference) == ("p", "a")
    assert read(tmp_path, [{"source": "s", "target": "t"}])[0] == Prompt("rows:1", "s", "t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": true}\n', "field 'prompt' is bool"),
        ('{"prompt": "x", "reference": true}\n', "field 'reference' is bool"),
        ('{"prompt": "x", "reference": NaN}\n', "field 'reference' is float"),
        ('{"prompt": ["x"]}\n', "is list, needs text.*such as prompt.0"),
        ('{"prompt": "x", "id": "\\ud800"}\n', "field 'id' holds a lone surrogate"),
        ('{"prompt": "a\x00b"}\n', "line 1: not JSON"),
        ('{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "1"}\n', "id '1' appears twice"),
    ],
)
def test_values_that_are_no_text_are_one_line(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_other_encodings_and_headers_are_one_line(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt\nGröße\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"not UTF-8 text.*iconv"):
        read_prompts(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("prompt,prompt\nx,y\n")
    with pytest.raises(InputError, match="column 'prompt' appears twice"):
        read_prompts(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("prompt,id\nx,\ny,\n")
    with pytest.raises(InputError, match="appears twice"):
        read_prompts(tmp_path / "c.csv")
    (tmp_path / "d.txt").write_text("a\x00b\n")
    assert read_prompts(tmp_path / "d.txt")[0].prompt == "a\x00b"


@pytest.mark.parametrize("container", PACK)
def test_a_list_in_a_json_file_is_rows(container, tmp_path):
    rows = [{"prompt": "one", "reference": 1}, {"prompt": "two"}]
    for name, text in (("a.json", json.dumps(rows)), ("b.jsonl", json.dumps(rows, indent=2))):
        path = tmp_path / f"{name}{container}"
        path.write_bytes(PACK[container](text.encode("utf-8-sig")))
        assert [(p.prompt, p.reference) for p in read_prompts(path)] == [("one", "1"), ("two", None)]
    lines = tmp_path / f"c.json{container}"
    lines.write_bytes(PACK[container](b'{"prompt": "one"}\n{"prompt": "two"}\n'))
    assert [p.prompt for p in read_prompts(lines)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[1]", "entry 1: a int, needs an object"),
        ("a.jsonl", b'{"prompt": "x", "prompt": "y"}\n', "'prompt' appears twice"),
        ("a.zip", b"PK\x03\x04" + bytes(30), "is a zip archive"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd123", "is zstd-compressed"),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(b'{"prompt": "x"}\n', mtime=0), mtime=0),
            "is compressed twice",
        ),
        ("a.txt", b"PAR1" + bytes(9), "is a Parquet file"),
        ("a.txt", b"one\rtwo\r", "carriage return alone"),
        ("a.jsonl", b'{"prompt": "x"}\r{"prompt": "y"}\r', "carriage return alone"),
        ("a.tsv", b'prompt\tid\n"x\t1\ny\t2\n', "check quotes"),  # a quote would swallow the second row
        ("a.tsv", b'prompt\tid\n"x" he said\t1\n', "check quotes"),  # and here be dropped
        ("a.csv", b'prompt,id\n"x,1\ny,2\n', "check quotes"),
    ],
)
def test_what_would_be_read_wrongly_is_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_people_rename_or_write_with_other_programs(tmp_path):
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b'{"prompt": "x"}\n'))
    assert read_prompts(tmp_path / "packed.jsonl")[0].prompt == "x"
    (tmp_path / "wide.jsonl").write_bytes('{"prompt": "ä"}\n'.encode("utf-32"))
    assert read_prompts(tmp_path / "wide.jsonl")[0].prompt == "ä"
    (tmp_path / "spaced.csv").write_text("id, prompt, reference\na,x,z\n")
    assert read_prompts(tmp_path / "spaced.csv") == [Prompt("a", "x", "z")]
    table = pyarrow.table({"\ufeffprompt": ["x"], "reference": [Decimal("1.50")]})
    pyarrow.parquet.write_table(table, tmp_path / "marked.parquet")
    assert read_prompts(tmp_path / "marked.parquet") == [Prompt("marked:1", "x", "1.50")]
