"""The first screen of a run with questions: escaped, marked where queries differ, usable by keyboard at both widths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report.browser import Browser
from report.conftest import HOSTILE, VERDICT

from deferral_train.report import write_report
from deferral_train.report.first import _differing
from deferral_train.report.tokens import Texts

CHOSEN = "opt:alpha=0.2"
ROWS = [[f"{HOSTILE.format(f'cell{line}')}", line, None, 0.1 + 0.2] for line in range(6)]


def answer(rule: str, verdict: str, rows: list | None) -> dict:
    reason = None if rows is not None else f"syntax: near {HOSTILE.format('reason')}"
    return {"rule": rule, "verdict": verdict, "text": "unused", "rows": rows, "more": 3, "reason": reason}


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hostile run with answers beside it."""
    root = tmp_path_factory.mktemp("first") / "hostile"
    shutil.copytree(run_folder, root)
    ids = list(dict.fromkeys(json.loads(line)["id"] for line in (root / "decode" / "outputs.jsonl").open()))
    rules = ("verifier_only", "lossless", "drafter_only", CHOSEN)
    answers = {
        "questions": len(ids),
        "right": dict(zip(rules, (0.975, 0.975, 0.4, 0.95))),
        "errors": {},
        "constant": 0.1,
        "shapes": {"questions": 9, "right": {"verifier_only": 1 / 3, CHOSEN: 2 / 9}},
        "chosen": CHOSEN,
        "examples": [
            {
                "id": name,
                "question": HOSTILE.format(f"question{number}"),
                "reference": "select 1",
                "answers": [
                    answer("verifier_only", "right", ROWS),
                    answer(CHOSEN, "syntax" if number else "right", None if number else ROWS),
                ],
            }
            for number, name in enumerate(ids[:3])
        ],
    }
    (root / "evaluation" / "answers.json").write_text(json.dumps(answers))
    said = [
        f"Of {len(ids)} new questions {HOSTILE.format('said')}",
        f"Certified {HOSTILE.format('certified')}",
    ]
    (root / "verdict.json").write_text(json.dumps({**VERDICT, "said": said}))
    settings = {
        "lossless": {"dial": None, "calls": 0.5, "right": 0.97},
        "opt:alpha=0.2": {
            "dial": {"rule": "opt", "parameter": "alpha", "value": 0.2},
            "calls": 0.4,
            "right": 0.96,
        },
        "opt:alpha=0.4": {
            "dial": {"rule": "opt", "parameter": "alpha", "value": 0.4},
            "calls": 0.3,
            "right": 0.9,
        },
    }
    summary = {
        label: {
            "dial": rule["dial"],
            "verifier_calls_per_token": rule["calls"],
            "quality": {f"sql:{HOSTILE.format('path')}": rule["right"]},
        }
        for label, rule in settings.items()
    }
    (root / "calibration").mkdir()
    (root / "calibration" / "summary.json").write_text(json.dumps({"rules": summary}))
    return write_report(root)


def test_everything_on_it_is_escaped_and_shown(page: Path) -> None:
    text = page.read_text()
    head, _, rest = text.partition("</h1>")
    assert "<script>document.title" not in text.partition('<script type="application/json"')[0]
    assert "&lt;script&gt;document.title=&#39;ownedsaid&#39;" in head
    for hostile in ("question0", "cell5", "reason", "certified"):
        assert f"owned{hostile}" in rest.partition('id="numbers"')[0]
    assert "NULL" in rest
    assert "0.3<" in rest  # 0.1 + 0.2, for reading
    assert "best constant answer 10.0%" in rest
    assert "33.3% right and the cascade 22.2%" in rest
    assert rest.count("<article") == 3


def test_the_picture_has_a_curve_per_rule_through_lossless_and_marks_the_chosen_point(page: Path) -> None:
    figure = page.read_text().partition('<figure class="first">')[2].partition("</figure>")[0]
    curve = figure.partition('data-series="opt"')[2].partition("</g>")[0]
    assert curve.count("<circle") == 3
    assert "dial 0.40: 90.0% right, 0.30 calls" in curve.replace("0.400", "0.40").replace("0.300", "0.30")
    # All of it on the calibration questions, where lossless is 97% right and so is the verifier alone.
    assert "97.5" not in figure
    for name in ("verifier alone", "lossless drafting", f"chosen: {CHOSEN}"):
        assert f'data-series="{name}"' in figure
    assert "drafter" not in figure  # it would press the rest together
    assert "The drafter alone gets 40.0% right" in page.read_text()


def test_without_judged_calibration_questions_the_picture_is_of_test_questions(
    page: Path, tmp_path: Path
) -> None:
    shutil.copytree(page.parent, tmp_path / "run")
    path = tmp_path / "run" / "calibration" / "summary.json"
    summary = json.loads(path.read_text())
    for rule in summary["rules"].values():
        rule["quality"] = {}
    path.write_text(json.dumps(summary))
    figure = write_report(tmp_path / "run").read_text().partition('<figure class="first">')[2]
    figure = figure.partition("</figure>")[0]
    assert 'data-series="opt"' not in figure
    for name in ("verifier alone", "lossless drafting", f"chosen: {CHOSEN}"):
        assert f'data-series="{name}"' in figure


def test_the_token_that_ends_a_text_is_not_shown() -> None:
    class Ends:
        eos_token_id = 1

    assert list(Texts(Ends()).without_end([5, 6, 1])) == [5, 6]
    assert list(Texts(Ends()).without_end([5, 6])) == [5, 6]
    assert list(Texts(Ends()).without_end([])) == []
    assert list(Texts(None).without_end([5, 1])) == [5, 1]


def test_only_tokens_without_a_counterpart_differ() -> None:
    first = ["SELECT", " name", " FROM", " t"]
    second = ["select", " name", " FROM", " t", ";"]
    assert _differing(first, second) == ([True, False, False, False], [True, False, False, False, True])
    assert _differing([], ["a"]) == ([], [True])


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("dark", [False, True])
def test_in_the_browser(browser: Browser, page: Path, width: int, height: int, dark: bool) -> None:
    browser.open(page, width, height, dark)
    assert browser.errors() == []
    assert browser.js("return document.title").startswith("hostile")  # no script of the texts ran
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.js("return document.querySelector('h1').getBoundingClientRect().top") < height / 4
    assert browser.js("return document.querySelector('figure.first').getBoundingClientRect().top") < height
    ring = "return getComputedStyle(document.querySelector('[data-series^=chosen] circle')).fill"
    assert browser.js(ring) == "none"
    contrast = (
        "const m = document.querySelector('mark'); const s = getComputedStyle(m);"
        "return [s.color, s.backgroundColor, s.textDecorationLine]"
    )
    ink, ground, line = browser.js(contrast)
    assert ink != ground
    assert "underline" in line  # not by colour alone
    browser.js("document.querySelector('.question .scroll').focus()")
    assert browser.js("return document.activeElement.getAttribute('role')") == "group"
