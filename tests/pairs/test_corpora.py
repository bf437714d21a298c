"""The standard library as text: parts that cannot overlap, prompts that come from one part only."""

import pytest

from deferral_train.errors import InputError
from deferral_train.pairs.corpora import PARTS, Document, code_prompts, part_of, stdlib_sources
from deferral_train.pairs.overlap import (
    check_no_overlap,
    find_overlap,
    read_training_ids,
    write_training_ids,
)
from deferral_train.pairs.prompts import Prompt
from deferral_train.pairs.scratch.train_config import PairText
from deferral_train.pairs.scratch.training_text import load_training_text


@pytest.fixture(scope="module")
def parts():
    return stdlib_sources()


def test_parts_are_disjoint_and_each_is_large_enough(parts):
    ids = [document.id for documents in parts.values() for document in documents]
    assert len(ids) == len(set(ids)) > 200
    assert set(parts) == set(PARTS)
    assert not any("test" in i.split("/") or "site-packages" in i for i in ids)
    characters = {part: sum(len(d.text) for d in documents) for part, documents in parts.items()}
    assert characters["pair"] > 2_000_000
    assert min(characters.values()) > 100_000


def test_split_depends_on_the_path_alone(parts):
    assert stdlib_sources() == parts
    assert part_of("json/decoder.py") == part_of("json/decoder.py")
    shares = [part_of(f"file{i}.py") for i in range(4000)]
    for part, share in PARTS.items():
        assert abs(shares.count(part) / 4000 - share) < 0.04


def test_prompts_are_consecutive_lines_of_held_out_files(parts):
    prompts = code_prompts(parts["test"], limit=60)
    texts = {d.id: d.text for d in parts["test"]}
    assert len({p.id for p in prompts}) == len({p.prompt for p in prompts}) == 60
    assert len({p.id.split("#")[0] for p in prompts}) > 8
    for prompt in prompts:
        file, line = prompt.id.split("#")
        assert (
            texts[file].splitlines(keepends=True)[int(line) - 1] == prompt.prompt.splitlines(keepends=True)[0]
        )
        assert prompt.prompt + prompt.reference in texts[file]
        assert len(prompt.prompt) < 800
        assert len(prompt.reference) >= 120


def test_windows_do_not_overlap_and_repeated_text_is_left_out():
    text = "".join(f"line {i} of a file\n" for i in range(200))
    prompts = code_prompts([Document("a.py", text)], None, 100, 60)
    assert "".join(p.prompt + p.reference for p in prompts) in text
    assert len(prompts) > 10
    assert code_prompts([Document("a.py", text), Document("b.py", text)], None, 100, 60) == prompts


def test_a_folder_without_sources_is_refused(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n" * 300)
    with pytest.raises(InputError, match=r"has 1 usable \.py files, needs 100"):
        stdlib_sources(tmp_path)


def test_overlap_is_found_by_id_by_file_and_by_text(tmp_path):
    trained = [
        Prompt("a.py", "def f():\n    return 'a line long enough to be told apart'\n"),
        Prompt("train.en:1", "one dog", "ein Hund"),
    ]
    write_training_ids(tmp_path / "training_ids.json", trained)
    record = read_training_ids(tmp_path)
    fine = [Prompt("b.py#1", "def g()"), Prompt("val.en:1", "one dog", "ein anderer Hund")]
    check_no_overlap(record, fine)
    by_line = [Prompt("lines:1", "    return 'a line long enough to be told apart'")]
    assert find_overlap(record, by_line) == ["lines:1"]
    seen = [
        Prompt("a.py#12", "x"),
        Prompt("train.en:1", "changed"),
        Prompt("other:5", "one  dog", "ein Hund\n"),
        Prompt("copy", "def f():\n", "return 'a line long enough to be told apart'"),
    ]
    assert find_overlap(record, fine + seen) == [p.id for p in seen]
    with pytest.raises(InputError, match=r"1 of 3 prompts were in the pair's training text, first a\.py#12"):
        check_no_overlap(record, [*fine, seen[0]])
    (tmp_path / "training_ids.json").write_text('{"ids": 3}')
    with pytest.raises(InputError, match="not a record of training ids"):
        read_training_ids(tmp_path)
    with pytest.raises(InputError, match="no readable record"):
        read_training_ids(tmp_path / "absent.json")


def test_training_text_of_a_pair_is_apart_from_head_prompts(parts, tmp_path):
    text = load_training_text(PairText())
    write_training_ids(tmp_path / "ids.json", text.train)
    record = read_training_ids(tmp_path / "ids.json")
    for part in ("fit", "validation", "calibration", "test"):
        check_no_overlap(record, code_prompts(parts[part], 50))
    assert len(find_overlap(record, code_prompts(parts["pair"], 50))) == 50


def test_plain_text_is_cut_into_blocks_and_some_are_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"sentence number {i}\n" for i in range(40_000)))
    text = load_training_text(PairText(files=(str(tmp_path / "book.txt"),)))
    assert 0.005 < len(text.heldout) / len(text.train) < 0.08
    assert not {t.id for t in text.train} & {t.id for t in text.heldout}
    joined = sorted([*text.train, *text.heldout], key=lambda t: int(t.id.split("#")[1]))
    assert "".join(t.prompt for t in joined) == (tmp_path / "book.txt").read_text()


def test_held_out_files_and_empty_text(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n")
    (tmp_path / "b.txt").write_text("other words\n")
    text = load_training_text(PairText(files=(str(tmp_path / "a.txt"),), heldout=(str(tmp_path / "b.txt"),)))
    assert [t.prompt for t in text.heldout] == ["other words\n"]
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(InputError, match="0 held out"):
        load_training_text(PairText(files=(str(tmp_path / "a.txt"),), heldout=(str(tmp_path / "b.txt"),)))
