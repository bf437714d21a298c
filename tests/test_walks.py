"""The walks of docs/contributing.md, each followed from a clean copy of the checkout by what the page says alone.

In a walk's section a block under ``<!-- file: PATH -->`` is written to that path, a ``diff`` block is applied, and a
``bash`` block is run by bash; any command that fails fails the walk. The second walk goes on where the first ended.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "contributing.md"
BLOCK = re.compile(
    r"^(?:<!-- file: (?P<file>.*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def walks() -> dict[str, str]:
    """Title to text of every section that is a walk."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    parts = (section.partition("\n") for section in sections)
    return {title: text for title, _, text in parts if title.startswith("A walk")}


def follow(text: str, clone: Path, programs_first: Path) -> None:
    """Do what a section says."""
    path = [str(programs_first), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = {**os.environ, "PYTHONPATH": str(clone), "PATH": os.pathsep.join(path)}
    for block in BLOCK.finditer(text):
        if block["file"]:
            (clone / block["file"]).write_text(block["text"], encoding="utf-8")
            continue
        programs = {
            "diff": ["git", "apply", "--unidiff-zero", "-"],
            "bash": ["bash", "-euo", "pipefail", "-s"],
        }
        done = subprocess.run(
            programs[block["kind"]],
            input=block["text"],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block['text']}\n{done.stdout}\n{done.stderr}"


@pytest.mark.timeout(1800)
def test_each_walk_leads_where_it_says(tmp_path, warm):
    if not (shutil.which("git") and shutil.which("bash")):
        pytest.skip("the page's commands need git and bash")
    clone = tmp_path / "clone"
    for name in ("deferral_train", "docs", "tests"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(walks()) == 2
    for text in walks().values():
        follow(text, clone, warm.folder)
    assert "| `unlikely` | position |" in (clone / "docs" / "catalogue.md").read_text(encoding="utf-8")
    assert (clone / "checkpoints" / "two-sided" / "model.safetensors").is_file()
