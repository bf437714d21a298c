"""The README's folder tree is the folder tree, what it points at exists, and what it types is understood."""

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


def test_every_linked_file_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(
        r"`(deferral_train/[\w/]+\.py|configs/[\w/]+\.yaml)`", text
    )
    linked += re.findall(r"--config (configs/[\w/]+\.yaml)", text)
    local = [name for name in linked if not name.startswith("http")]
    assert len(local) > 8
    assert [name for name in local if not (ROOT / name).exists()] == []


def test_flags_typed_in_the_readme_are_flags():
    """Every `--flag` of a `deferral-train COMMAND` line is a parameter of that command."""
    import importlib

    from deferral_train.cli import COMMANDS

    lines = re.findall(
        r"^ {4}deferral-train ([\w-]+) +(.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name for name, _ in lines} >= {"doctor", "collect", "fit", "export", "evaluate", "decode"}
    for name, words in lines:
        assert name in COMMANDS
        command = importlib.import_module(f"deferral_train.commands.{name.replace('-', '_')}")
        known = set(command.run.__annotations__) | set(
            getattr(command, "SETTINGS", command.run).__annotations__
        )
        flags = {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", words)}
        if name != "fit":  # its flags are Lightning's
            assert flags <= known, name


def test_python_example_runs(tmp_path, monkeypatch):
    """The README's own lines, on a tiny pair in the place of the quickstart's."""
    from tiny_models import save_tiny_pair

    save_tiny_pair("llama", tmp_path / "runs" / "quickstart" / "pair")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## In Python\n.*?\n\n```python\n(.*?)```", text, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code.group(1), "README.md", "exec"), scope)
    assert scope["result"].stats.mean_acceptance_length >= 1.0
