"""List the studies, each with the first line of its docstring: `python -m benchmarks.studies`."""

from __future__ import annotations

import ast
from pathlib import Path

HELPERS = ("drafting_study",)  # parts of another study

if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        if path.stem not in HELPERS:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"python -m benchmarks.studies.{path.stem:<18} {text.splitlines()[0]}")
