"""Sphinx builds the site from the pages as they lie here: `make docs`, warnings are errors.

The reference is made from the package's sources as text (reference_pages.py), so that neither torch nor transformers
need be installed. A link that leads out of docs/ is a link in the repository; on the site the file that it
names is put beside the pages.
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from reference_pages import PAGES  # noqa: E402 - it lies here

DESCRIPTION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project, release = "deferral_train", DESCRIPTION["version"]
copyright = "the deferral_train authors, Apache-2.0"
extensions = ["myst_parser"]
root_doc = "index"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"deferral_train {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
templates_path: list[str] = []

myst_heading_anchors = 4
myst_links_external_new_tab = False

SOURCES = "source"  # folder of the site with the repository's files that pages name
NAMED = {"README.md": "index.md"}  # of the repository's pages those that the site has under another name


def _lead_out(app: Any, docname: str, source: list[str]) -> None:
    """Turn links to files out of docs/ into links to copies on the site, and keep the files for it."""
    if docname in PAGES:
        source[0] += "\n" + PAGES[docname](ROOT)
    page = (HERE / docname).parent

    def of_site(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        place = (page / target).resolve()
        if "://" in target or place.is_relative_to(HERE) or not place.is_relative_to(ROOT):
            return found[0]
        name = place.relative_to(ROOT).as_posix()
        up = "../" * docname.count("/")
        if name in NAMED:
            return f"[{text}]({up}{NAMED[name]}{anchor or ''})"
        if place.is_dir():
            return f"`{name}/`"
        app.leading_out.add(name)
        return f'<a href="{up}{SOURCES}/{name}.txt">{text}</a>'

    # Not in code: a fence or a span shows what it holds.
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`(?!\]))", source[0], flags=re.MULTILINE | re.DOTALL)
    link = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
    source[0] = "".join(part if number % 2 else link.sub(of_site, part) for number, part in enumerate(parts))


def _copy_named(app: Any, exception: Exception | None) -> None:
    for name in sorted(app.leading_out) if exception is None else ():
        target = Path(app.outdir) / SOURCES / f"{name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)


def setup(app: Any) -> dict[str, bool]:
    app.leading_out = set()
    app.connect("source-read", _lead_out)
    app.connect("build-finished", _copy_named)
    return {"parallel_read_safe": False}
