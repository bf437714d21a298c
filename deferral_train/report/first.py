"""The first screen of a run with questions: what was gained and lost in a sentence, one picture, three answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup

from deferral_train.report.load import RunFolder
from deferral_train.report.numbers import limits
from deferral_train.report.svg import Series, line_chart, nice
from deferral_train.report.tokens import Texts

NAMES = {"verifier_only": "verifier alone", "lossless": "lossless drafting"}
CHOSEN = "chosen"  # the style sheet marks a series whose name begins so
PERCENT = 100


def first_screen(run: RunFolder, texts: Texts) -> dict[str, Any] | None:
    """Sentences, picture and answers; None for a run without questions.

    Returns:
        ``said`` (sentences, the first as headline), ``chart``, ``control``, ``answers`` (of three questions: pieces of
        each query with those that differ, and the rows it gives), ``facts`` (accuracy of what was decoded, and of a
        constant answer).
    """
    found, verdict = run.answers, run.verdict or {}
    if found is None or not verdict.get("said"):
        return None
    return {
        "said": verdict["said"],
        "chart": _chart(run),
        "answers": [_question(run, example, texts) for example in found["examples"]],
        "facts": _facts(found, verdict),
        "control": verdict.get("control"),
    }


def _chart(run: RunFolder) -> Markup:
    """Share of right answers against verifier calls per token: tried settings as curves, decoded test points."""
    assert run.answers is not None
    series = []
    if run.calibration is not None:
        for colour, (name, points) in enumerate(_curves(run.calibration).items()):
            notes = [
                f"dial {nice(p['value'])}: {p['right']:.1f}% right, {nice(p['calls'])} calls" for p in points
            ]
            xs, ys = [p["calls"] for p in points], [p["right"] for p in points]
            series.append(Series(name, xs, ys, colour=colour, notes=notes))
    rules = (run.summary or {}).get("rules", {})
    for label, right in run.answers["right"].items():
        calls = rules.get(label, {}).get("verifier_calls_per_token")
        # The drafter alone, far below, would press everything else together; its accuracy stands in the text.
        if (
            calls is None
            or label == "drafter_only"
            or (label not in NAMES and label != run.answers["chosen"])
        ):
            continue
        name = NAMES.get(label, f"{CHOSEN}: {label}")
        series.append(
            Series(name, [calls], [PERCENT * right], colour=2 if label in NAMES else 4, kind="points")
        )
    return line_chart(
        "Right answers against verifier calls per token",
        series,
        "verifier calls per token",
        "right answers, %",
        labels=True,
    )


def _curves(summary: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Rule to its settings on the calibration questions, lossless among them, from few calls to many.

    Left out are those that another setting of the rule beats in both calls and right answers.
    """
    rules = {label: rule for label, rule in summary["rules"].items() if _right(rule) is not None}
    families: dict[str, list[dict[str, float]]] = {}
    for label, rule in rules.items():
        if rule.get("dial") is not None:
            families.setdefault(label.rpartition(":")[0], []).append(_point(rule))
    base = [_point(rules["lossless"])] if "lossless" in rules else []
    return {name: _front([*base, *points]) for name, points in families.items()}


def _front(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The points that have more right answers than every one of fewer calls."""
    kept: list[dict[str, float]] = []
    for point in sorted(points, key=lambda point: (point["calls"], -point["right"])):
        if not kept or point["right"] > kept[-1]["right"]:
            kept.append(point)
    return kept


def _point(rule: Mapping[str, Any]) -> dict[str, float]:
    right = _right(rule)
    assert right is not None
    value = (rule.get("dial") or {}).get("value") or 0.0
    return {"calls": rule["verifier_calls_per_token"], "right": PERCENT * right, "value": value}


def _right(rule: Mapping[str, Any]) -> float | None:
    """Execution accuracy of a rule's summary."""
    return next((value for name, value in rule["quality"].items() if name.startswith("sql:")), None)


def _question(run: RunFolder, example: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    rows = {(row["rule"], row["id"]): row for row in run.outputs if row["repetition"] == 0}
    written = [rows.get((answer["rule"], example["id"])) for answer in example["answers"]]
    pieces = [[] if row is None else texts.pieces(texts.without_end(row["tokens"])) for row in written]
    differing = _differing(*pieces)
    return {
        "question": example["question"],
        "answers": [
            {
                "who": NAMES.get(answer["rule"], f"cascade ({answer['rule']})"),
                "verdict": answer["verdict"],
                "right": answer["verdict"] == "right",
                "pieces": [{"text": text, "differs": differs} for text, differs in zip(own, marks)],
                "calls": None if row is None else row["counts"]["verifier_calls"],
                "tokens": 0 if row is None else len(row["tokens"]),
                "rows": [[_cell(value) for value in line] for line in answer["rows"] or []],
                "more": answer["more"],
                "reason": answer["reason"],
            }
            for answer, row, own, marks in zip(example["answers"], written, pieces, differing)
        ],
    }


def _differing(first: Sequence[str], second: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """For each piece of both texts whether it has no counterpart in the other."""
    marks = ([True] * len(first), [True] * len(second))
    for a, b, size in SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        marks[0][a : a + size] = [False] * size
        marks[1][b : b + size] = [False] * size
    return marks


def _cell(value: Any) -> str:
    return "NULL" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(found: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[str]:
    right = found["right"]
    facts = [
        f"An answer counts as right when the query, run on the database, gives the rows of the reference query. The "
        f"drafter alone gets {right['drafter_only']:.1%} right, the best constant answer {found['constant']:.1%}."
    ]
    quality = verdict.get("quality") or {}
    if quality.get("low") is not None:
        facts.append(
            f"On these questions the chosen setting differs from lossless by {quality['difference']:+.1f} answers in a "
            f"hundred (95% interval {limits(quality['low'], quality['high'], 1.0, True)})."
        )
    shapes = found["shapes"]
    facts.append(
        f"Asked {shapes['questions']} questions of two shapes that nobody was taught, the verifier answers "
        f"{shapes['right']['verifier_only']:.1%} right and the cascade {shapes['right'][found['chosen']]:.1%}; these "
        "count for no certificate."
    )
    return facts
