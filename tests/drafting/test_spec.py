"""What ``--drafting`` means, and the command with it, on checkpoints and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_pair, tiny_model, tiny_tokenizer

from deferral_train.cli import main
from deferral_train.decoding.drafting import BigramTable
from deferral_train.decoding.drafting.spec import drafting_from_spec
from deferral_train.errors import InputError


def test_short_forms() -> None:
    assert drafting_from_spec("max_gram:tokens=7").plan.k == ((7,),)
    spec = drafting_from_spec("vertical:tokens=3,copies=8,lenience=2,match=latest,least=2")
    assert (spec.plan.k, spec.plan.lenience, spec.smaller) == (((3, 0), (0, 8)), 2, ())
    assert spec.plan.max_gram is not None
    assert (spec.plan.max_gram.match, spec.plan.max_gram.least) == ("latest", 2)
    assert drafting_from_spec("horizontal:tokens=3,copies=5").plan.k == ((3, 5), (0, 0))
    assert drafting_from_spec("both").plan.k == ((4, 10), (0, 10))


def test_a_file_says_anything(tmp_path: Path) -> None:
    BigramTable(torch.tensor([1, 0]), "t").save(tmp_path / "b")
    text = (
        f"k: [[2, 1, 0], [0, 1, 0], [0, 0, 5]]\nlenience: 3\nsmaller: [some/folder]\nbigrams: {tmp_path}/b\n"
    )
    (tmp_path / "drafting.yaml").write_text(text)
    spec = drafting_from_spec(str(tmp_path / "drafting.yaml"))
    assert spec.plan.k == ((2, 1, 0), (0, 1, 0), (0, 0, 5))
    assert spec.smaller == ("some/folder",)
    assert spec.plan.max_gram is not None
    assert spec.plan.max_gram.bigrams is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("diagonal:tokens=3", "unknown; use max_gram"),
        ("vertical:length=3", "no key 'length'"),
        ("vertical:tokens=0", "first row of 0"),
        ("vertical:lenience=0.5", "lenience is 0.5"),
        ("vertical:bigrams=/nowhere", "no file /nowhere"),
        ("nowhere.yaml", "no file"),
        ("[1, 2]", "unknown"),
    ],
)
def test_bad_specs_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        drafting_from_spec(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("k: 5\n", "k is 5"),
        ("lenience: 2\n", "k is None"),
        ("k: [[1]]\ndraft: 3\n", "no key 'draft'"),
        ("k: [[1]]\nsmaller: folder\n", "give a list of checkpoints"),
        ("- 3\n", "holds no keys"),
        ("k: [[1\n", "is not YAML"),
    ],
)
def test_bad_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "drafting.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        drafting_from_spec(str(path))


def test_decode_with_three_levels_gives_the_verifiers_texts(tmp_path: Path, capsys) -> None:
    drafter, verifier = save_tiny_pair("llama", tmp_path)
    smaller = tmp_path / "smaller"
    tiny_model("llama", 8, layers=1).save_pretrained(smaller)
    tiny_tokenizer().save_pretrained(smaller)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2 w3 w1 w2\nw9 w8 w9 w8\n")
    plan = tmp_path / "drafting.yaml"
    plan.write_text(f"k: [[3, 2, 0], [0, 1, 0], [0, 0, 5]]\nlenience: 2\nsmaller: ['{smaller}']\n")
    texts = {}
    for name, drafting in (("plain", None), ("file", str(plan)), ("short", "max_gram:tokens=5")):
        command = ["decode", f"--drafter={drafter}", f"--verifier={verifier}", f"--prompts={prompts}"]
        command += [f"--out={tmp_path / name}", "--max_new_tokens=12"]
        command += [] if drafting is None else [f"--drafting={drafting}"]
        assert main(command) == 0
        rows = (tmp_path / name / "outputs.jsonl").read_text().splitlines()
        texts[name] = {row["id"]: row["text"] for row in map(json.loads, rows)}
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        drafts = summary["settings"]["drafting"]
        assert (drafts is None) == (drafting is None)
        if drafting == str(plan):
            assert drafts["k"] == [[3, 2, 0], [0, 1, 0], [0, 0, 5]]
    assert texts["plain"] == texts["file"] == texts["short"]
    capsys.readouterr()
    assert main([*command[:-1], "--drafting=vertical:lenience=0"]) == 2
    assert "lenience is 0" in capsys.readouterr().err
    plan.write_text("k: [[3, 2, 0], [0, 1, 0], [0, 0, 5]]\n")
    assert main([*command[:-1], f"--drafting={plan}"]) == 2
    assert "k has 3 rows for 1 drafter" in capsys.readouterr().err
