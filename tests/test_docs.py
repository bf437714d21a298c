"""Every code block of the documentation runs, page by page in order, on a tiny pair and a few prompts.

```python blocks of a page share one namespace. ```sh blocks hold one command a line (continued with a backslash);
`deferral-train` is called in this process. HTML comments before a block: `<!-- file: NAME -->` also saves it under
that name, `<!-- not run: REASON -->` leaves it out. The folder a page runs in holds what the pages assume:
models/drafter, models/verifier, prompts.jsonl, validation.jsonl, calibration.jsonl, test.jsonl, traces/, an exported
head in checkpoints/my-head, configs/, and the same pair and head in runs/quickstart/ as `make quickstart` leaves them.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import WORDS, save_tiny_pair

from deferral_train import cli
from deferral_train.heads import GapHead
from deferral_train.training.config import VERIFY_FEATURES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^((?:<!--.*?-->\n)*)```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("python", "sh")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    code: str
    notes: dict[str, str]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        notes = dict(re.findall(r"<!-- ([\w ]+): (.*?) -->", match.group(1)))
        line = text[: match.start(3)].count("\n") + 1
        found.append(Block(page.name, line, match.group(2), match.group(3), notes))
    return found


RUNNABLE = {page.name: [block for block in blocks(page) if block.kind in RUN] for page in PAGES}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_tiny_pair("llama", folder / "models")
    torch.manual_seed(0)
    head = GapHead(VERIFY_FEATURES, hidden=(8,))
    head.metadata = {"alpha": 0.1}
    head.save_pretrained(folder / "checkpoints" / "my-head")
    draw = random.Random(0)
    for name, count in (("prompts", 24), ("validation", 12), ("calibration", 24), ("test", 12)):
        rows = [
            {
                "id": f"{name}-{n}",
                "prompt": " ".join(draw.choices(WORDS, k=6)),
                "reference": " ".join(draw.choices(WORDS, k=5)),
            }
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {name: folder / "models" / name for name in ("drafter", "verifier")}
    flags |= {"prompts": folder / "prompts.jsonl", "out": folder / "traces", "progress": "false"}
    assert cli.main(["collect", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "runs" / "quickstart").mkdir(parents=True)
    (folder / "runs" / "quickstart" / "pair").symlink_to(folder / "models")
    (folder / "runs" / "quickstart" / "head").symlink_to(folder / "checkpoints" / "my-head")
    return folder


@pytest.fixture
def place(material, tmp_path, monkeypatch) -> Path:
    """A folder of the page's own, over the shared material."""
    for entry in material.iterdir():
        if entry.name not in ("runs", "checkpoints"):
            (tmp_path / entry.name).symlink_to(entry)
    for name in ("runs/quickstart/pair", "runs/quickstart/head", "checkpoints/my-head"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(material / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [name for name, found in RUNNABLE.items() if found])
def test_code_blocks_run(page, place, monkeypatch, capsys):
    module = ModuleType("docs_page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in RUNNABLE[page]:
        if "not run" in block.notes:
            continue
        if "file" in block.notes:
            (place / block.notes["file"]).write_text(block.code)
            monkeypatch.syspath_prepend(place)  # as for a Python that is started there
            # In sys.modules for this page only: a module of that name from elsewhere goes, and so does this one.
            monkeypatch.setitem(sys.modules, Path(block.notes["file"]).stem, ModuleType("replaced"))
            monkeypatch.delitem(sys.modules, Path(block.notes["file"]).stem)
        if block.kind == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), module.__dict__)
            continue
        for command in commands(block):
            if command[0] == "PYTHONPATH=.":
                monkeypatch.syspath_prepend(place)
                command = command[1:]
            assert command[0] == "deferral-train", (
                f"{page}, line {block.line}: {command[0]} needs a note 'not run'"
            )
            assert cli.main(command[1:]) == 0, (
                f"{page}, line {block.line}: {command}\n{capsys.readouterr().err}"
            )


def commands(block: Block) -> list[list[str]]:
    text = block.code.replace("\\\n", " ")
    return [words for words in (shlex.split(line, comments=True) for line in text.splitlines()) if words]


def test_blocks_that_are_not_run_say_why_and_are_few():
    skipped = [block for found in RUNNABLE.values() for block in found if "not run" in block.notes]
    assert all(len(block.notes["not run"]) > 10 for block in skipped)
    assert len(skipped) <= 10
    ran = sum(len(found) for found in RUNNABLE.values()) - len(skipped)
    assert ran >= 12


def test_links_between_pages_lead_somewhere():
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not target.startswith(("http", "mailto"))
    ]
    assert len(links) > 30
    assert [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()] == []
