"""The page in headless Chromium, at desktop and phone width, by mouse, touch and keyboard."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from report.browser import Browser
from report.conftest import HOSTILE

from deferral_train.report import write_report

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Path:
    return write_report(run_folder)


@pytest.mark.parametrize("width", WIDTHS)
def test_page_opens_without_errors_scripts_or_sideways_scrolling(
    browser: Browser, page: Path, width: str
) -> None:
    browser.open(page, *WIDTHS[width])
    assert browser.js("return document.title").startswith("hostile")  # no script of the texts ran
    assert browser.errors() == []
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.text("h1").endswith(HOSTILE.format("headline"))
    assert HOSTILE.format("id") in browser.text("#token-prompt option")
    assert HOSTILE.format("reference") == browser.text("#token-reference")
    assert "<script>document.title" in browser.text("#token-text")
    assert browser.count("#token-text script") == 0


def test_token_view_by_keyboard_mouse_and_touch(browser: Browser, page: Path) -> None:
    browser.open(page, *WIDTHS["desktop"])
    browser.focus("#token-text")
    first = browser.text("#token-detail")
    browser.press("ArrowRight")
    second = browser.text("#token-detail")
    assert second != first
    assert "estimated loss gap" in second
    assert "verifier's top" in second
    browser.press("Home")
    assert browser.text("#token-detail") == first
    browser.press("End")
    last = browser.js("return document.querySelector('#token-text').children.length - 1")
    assert browser.js("return document.querySelector('[aria-selected=true]').id") == f"token-{last}"
    browser.mouse("#token-2", click=False)
    assert browser.js("return document.querySelector('[aria-selected=true]').id") == "token-2"
    browser.open(page, *WIDTHS["phone"])
    browser.tap("#token-3")
    assert browser.becomes("return document.querySelector('[aria-selected=true]').id", "token-3")


def test_tokens_are_coloured_by_origin(browser: Browser, page: Path, run_folder: Path) -> None:
    import json

    browser.open(page, *WIDTHS["desktop"])
    shown = browser.js(
        "return [...document.querySelector('#token-text').children].map(e => e.className.split(' ')[1])"
    )
    rows = [json.loads(line) for line in (run_folder / "decode" / "outputs.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["rule"] == "opt:alpha=0.2" and r["id"] == rows[0]["id"])
    names = ["none", "kept", "accepted", "resampled", "bonus", "unverified"]
    assert shown == [names[origin] for origin in row["origin"]]


def readout(browser: Browser) -> dict[str, float]:
    names = ("risk", "rejection", "deferral")
    return {name: float(browser.text(f"#slider-{name}")) for name in names} | {
        "alpha": float(browser.text("#alpha-value"))
    }


def test_slider_by_mouse_and_keyboard_recomputes_from_the_logged_numbers(
    browser: Browser, page: Path, run_folder: Path
) -> None:
    import json

    prompts = json.loads((run_folder / "evaluation" / "prefixes.json").read_text())["prompts"]
    browser.open(page, *WIDTHS["desktop"])
    seen = [readout(browser)]
    browser.mouse("#alpha", to=0.9)
    seen.append(readout(browser))
    browser.focus("#alpha")
    for _ in range(3):
        browser.press("ArrowLeft")
    seen.append(readout(browser))
    browser.press("Home")
    seen.append(readout(browser))
    assert seen[1]["alpha"] > 0.5 > seen[0]["alpha"]
    assert seen[2]["alpha"] < seen[1]["alpha"]
    assert seen[3]["alpha"] == -1.0
    for state in seen:
        # alpha is shown with three digits: rows that fall between may decide either way.
        risk, rejection, deferral = expected(prompts, state["alpha"])
        assert state["risk"] == pytest.approx(risk, abs=0.01)
        assert state["rejection"] == pytest.approx(rejection, abs=0.01)
        assert state["deferral"] == pytest.approx(deferral, abs=0.01)
    assert seen[3]["deferral"] > seen[1]["deferral"]
    first = prompts[0]
    colours = browser.js("return [...document.querySelector('#slider-text').children].map(e => e.className)")
    defer = [gap > -1.0 * tv for gap, tv in zip(first["gap"]["opt (plug-in)"], first["tv"])]
    assert colours == [f"token {'accepted' if d else 'kept'}" for d in defer]


def expected(prompts: list[dict], alpha: float) -> tuple[float, float, float]:
    rows = [
        (gap > alpha * tv, tv, loss, observed)
        for prompt in prompts
        for gap, tv, loss, observed in zip(
            prompt["gap"]["opt (plug-in)"], prompt["tv"], prompt["drafter_loss"], prompt["observed_gap"]
        )
    ]
    count = len(rows)
    risk = sum(loss - defer * observed for defer, _, loss, observed in rows) / count
    return risk, sum(d * tv for d, tv, _, _ in rows) / count, sum(d for d, *_ in rows) / count


def test_legend_hides_a_rule_from_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, *WIDTHS["desktop"])
    css = "[data-charts=curves] [data-series=chow]"
    assert browser.count(css) >= 1
    browser.focus("[data-legend=curves] [data-name=chow]")
    browser.press("Enter")
    assert browser.count(f"{css}.hidden") == browser.count(css)


def test_dark_mode_changes_paper_and_ink(browser: Browser, page: Path) -> None:
    colours = []
    for dark in (False, True):
        browser.open(page, *WIDTHS["desktop"], dark=dark)
        colours.append(browser.js("return getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(18, 22, 27)"]
    assert contrast(browser) > 7


def contrast(browser: Browser) -> float:
    """WCAG contrast of body text."""
    both = browser.js("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    light = sorted(_luminance(colour) for colour in both)
    return (light[1] + 0.05) / (light[0] + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_first_paint_within_a_second(browser: Browser, page: Path) -> None:
    """The number itself depends on the machine; what is asserted is that the page can paint and says when."""
    browser.open(page, *WIDTHS["desktop"])
    for _ in range(50):
        paints = dict(
            browser.js("return performance.getEntriesByType('paint').map(e => [e.name, e.startTime])")
        )
        if paints:
            break
        time.sleep(0.1)
    assert paints["first-contentful-paint"] < 5000
