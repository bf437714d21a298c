"""The page as text: self-contained, escaped, complete, and plain about what was not measured."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.conftest import HOSTILE

from deferral_train.report import write_report
from deferral_train.report.svg import Axis, Series, line_chart


class Scripts(HTMLParser):
    """Collects script elements as a browser would see them, and everything that points outside of the
    page.
    """

    def __init__(self) -> None:
        super().__init__()
        self.types: list[str | None] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "script":
            self.types.append(named.get("type"))
        self.outside += [
            v for k, v in attrs if k in ("src", "href", "action") and v and not v.startswith("#")
        ]


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    return write_report(run_folder).read_text(encoding="utf-8")


def test_hostile_text_is_text(page: str) -> None:
    """Every word, id, reference and headline of this run is a script element; none becomes one."""
    scripts = Scripts()
    scripts.feed(page)
    assert scripts.types == ["application/json", "application/json", None]
    assert HOSTILE.format("headline") not in page
    assert "&lt;script&gt;document.title=&#39;ownedheadline&#39;" in page
    assert "\\u003cscript\\u003e" in page


def test_nothing_is_loaded_and_the_page_is_small(page: str) -> None:
    scripts = Scripts()
    scripts.feed(page)
    assert scripts.outside == []
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)
    assert len(page.encode()) < 3_000_000


def test_first_screen_holds_the_answer(page: str) -> None:
    head = page[page.index("<body>") : page.index("<main>")]
    for expected in ("1.4x as fast", "1.40×", "60%", "−1.00", "OPT", "Can these numbers be trusted?"):
        assert expected in head


def test_sections_without_input_say_so(run_folder: Path, page: str, tmp_path: Path) -> None:
    assert page.count("Not measured in this run") == 2  # no training log, no skew
    (tmp_path / "evaluation").mkdir()
    shutil.copy(run_folder / "evaluation" / "scores.json", tmp_path / "evaluation")
    bare = write_report(tmp_path).read_text(encoding="utf-8")
    assert bare.count("Not measured in this run") == 6
    assert "no verdict" in bare


def test_training_log_becomes_a_curve(run_folder: Path, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
    with SummaryWriter(str(tmp_path / "fit" / "log")) as writer:
        for step in range(5):
            writer.add_scalar("val/regret", 0.5 / 2**step, step)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'data-series="val/regret"' in text
    assert "val/regret: 4, 0.0312" in text


def test_chart_puts_points_where_they_belong() -> None:
    svg = str(line_chart("t", [Series("<a>", [0.0, 1.0], [0.0, 2.0])], "x", "y"))
    assert "<a>" not in svg
    dots = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert dots[0][0] < dots[1][0]
    assert dots[0][1] > dots[1][1]  # larger y is higher up
    assert Axis("", 0.0, 1.0).ticks() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_constant_series_and_empty_charts_are_drawn() -> None:
    assert "circle" in line_chart("t", [Series("a", [1.0], [3.0])], "x", "y")
    assert line_chart("t", [Series("a", [], [])], "x", "y") == ""
