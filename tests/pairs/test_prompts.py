"""Every kind of prompts file gives the same prompts; what cannot be read is named by file, row and remedy."""

import csv
import gzip
import json

import pandas
import pytest

from deferral_train.errors import InputError
from deferral_train.pairs.prompts import Prompt, read_prompts, write_prompts

ROWS = [("Why?", 'Because, "so".'), ("Two\nlines, one cell", "ja, größer"), ("", "nothing asked")]


def write(folder, kind):
    path = folder / f"asked.{kind}"
    columns = {"question": [q for q, _ in ROWS], "answer": [a for _, a in ROWS]}
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("question", "answer"), *ROWS])
    else:
        pandas.DataFrame(columns).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("zipped", [False, True])
def test_tables_keep_every_row(kind, zipped, tmp_path):
    path = write(tmp_path, kind)
    if zipped:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    expected = [Prompt(f"asked:{i}", q, a) for i, (q, a) in enumerate(ROWS, 1)]
    assert read_prompts(path) == expected
    assert read_prompts(path, start=1, limit=1) == expected[1:2]


def test_lines_and_line_pairs(tmp_path):
    (tmp_path / "train.en").write_text("one\n\nthree\u2028still three\n")
    with gzip.open(tmp_path / "train.de.gz", "wt") as file:
        file.write("eins\r\n\r\ndrei\r\n")
    lines = read_prompts(tmp_path / "train.en")
    assert [p.prompt for p in lines] == ["one", "", "three\u2028still three"]
    assert all(p.reference is None for p in lines)
    pairs = read_prompts(
        tmp_path / "train.en", reference_path=tmp_path / "train.de.gz", template="en-de: {prompt}"
    )
    assert pairs[2] == Prompt("train.en:3", "en-de: three\u2028still three", "drei")


def test_real_parallel_text_and_gsm8k(multi30k, gsm8k):
    pairs = read_prompts(multi30k / "val.en.gz", reference_path=multi30k / "val.de.gz")
    assert len(pairs) == 1014
    assert pairs[0].prompt.startswith("A group of men")
    assert pairs[0].reference
    problems = read_prompts(gsm8k / "test.jsonl.gz")
    assert len(problems) == 1319
    assert "####" in (problems[0].reference or "")


def test_data_set_folders(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["a b", "c d"], "target": ["e", "f"]})
    data.save_to_disk(tmp_path / "saved")
    assert [p.reference for p in read_prompts(tmp_path / "saved")] == ["e", "f"]
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "splits")
    assert len(read_prompts(tmp_path / "splits", split="validation")) == 2
    with pytest.raises(InputError, match="split 'train'"):
        read_prompts(tmp_path / "splits")
    (tmp_path / "raw").mkdir()
    data.to_json(tmp_path / "raw" / "train.jsonl")
    assert read_prompts(tmp_path / "raw")[1] == Prompt("raw:2", "c d", "f")
    with pytest.raises(InputError, match="cannot be loaded"):
        read_prompts("no_such_data_set_anywhere")


def test_ids_and_nested_fields(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 7, "t": {"en": "x", "de": "y"}}\n{"id": "b", "t": {"en": "z", "de": null}}\n')
    read = read_prompts(path, prompt_field="t.en", reference_field="t.de")
    assert read == [Prompt("7", "x", "y"), Prompt("b", "z", None)]
    path.write_text('{"id": 7, "prompt": "x"}\n{"id": "7", "prompt": "y"}\n')
    with pytest.raises(InputError, match="id '7' appears twice"):
        read_prompts(path)


def test_written_prompts_read_back(tmp_path):
    prompts = [Prompt("a", "x\ny", "ü"), Prompt("b", "", None)]
    for name in ("p.jsonl", "p.jsonl.gz"):
        write_prompts(tmp_path / name, prompts)
        assert read_prompts(tmp_path / name) == prompts
    first = (tmp_path / "p.jsonl.gz").read_bytes()
    write_prompts(tmp_path / "p.jsonl.gz", prompts)
    assert (tmp_path / "p.jsonl.gz").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{broken\n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "entry 1: a int, needs an object"),
        ("a.jsonl", b'{"prompt": 3}\n', "field 'prompt' is int, needs text"),
        ("a.jsonl", b'{"said": "x"}\n', "row 1: no prompt, question.*in {said}"),
        ("a.jsonl", b"", "no rows"),
        ("a.csv", b"prompt,reference\nx\n", "row 1: number of cells differs"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt.gz", b"\x1f\x8b\x08 cut", "damaged or cut short"),
        ("a.txt.gz", b"plain", "damaged or cut short"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet"),
    ],
)
def test_bad_files_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bad_arguments(tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "b.txt").write_text("x\ny\n")
    with pytest.raises(InputError, match=r"a\.txt has 1 lines, .*b\.txt has 2"):
        read_prompts(tmp_path / "a.txt", reference_path=tmp_path / "b.txt")
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="format='xml'"):
        read_prompts(tmp_path / "a.txt", "xml")
    with pytest.raises(InputError, match="template"):
        read_prompts(tmp_path / "a.txt", template="translate:")
    with pytest.raises(InputError, match="limit=0"):
        read_prompts(tmp_path / "a.txt", limit=0)
    with pytest.raises(InputError, match="no rows from row 6"):
        read_prompts(tmp_path / "a.txt", start=5)
    write_prompts(tmp_path / "p.jsonl", [Prompt("a", "x")])
    with pytest.raises(InputError, match="no field 'gold'"):
        read_prompts(tmp_path / "p.jsonl", reference_field="gold")


def test_mmlu_tables(tmp_path):
    path = tmp_path / "anatomy_test.csv"
    path.write_text('"Which bone, of these?",ulna,"femur\nor so",rib,skull,B\n1+1?,1,2,3,4,B\n')
    first, second = read_prompts(path, format="mmlu", template="Q: {prompt}")
    assert first.prompt == "Q: Which bone, of these?\nA. ulna\nB. femur\nor so\nC. rib\nD. skull\nAnswer:"
    assert (second.id, second.reference) == ("anatomy_test:2", "B")
    path.write_text("question,A,B,C,D,answer\n")
    with pytest.raises(
        InputError, match="row 1: 6 cells; an MMLU row is question, four choices and one of A, B"
    ):
        read_prompts(path, format="mmlu")
    path.write_text("1+1?,1,2,B\n")
    with pytest.raises(InputError, match="row 1: 4 cells"):
        read_prompts(path, format="mmlu")
