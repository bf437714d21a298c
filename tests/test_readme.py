"""The README's folder tree is the folder tree, and its Python example runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tracked_folders() -> set[str]:
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    folders = {parent.as_posix() for name in listed if name for parent in Path(name).parents}
    return {folder for folder in folders if folder != "." and not folder.startswith("tests/")}


def stated_folders() -> set[str]:
    """Folders of the README's tree block: two spaces of indent per level, a name ending in a slash."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Tree\n+```\w*\n(.*?)```", text, re.DOTALL)
    assert block, "the README has no tree"
    stack: list[str] = []
    found = set()
    for line in block.group(1).splitlines():
        entry = re.match(r"( *)([\w.-]+)/(?:\s|$)", line)
        if entry:
            stack[len(entry.group(1)) // 2 :] = [entry.group(2)]
            found.add("/".join(stack))
    return found


def test_tree_in_the_readme_is_the_tree():
    assert stated_folders() == tracked_folders()
