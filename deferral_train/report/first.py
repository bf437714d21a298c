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
    """Share of right answers against verifier calls per token, all of it on one set of questions.

    With calibration questions, tried settings are curves and the chosen one is marked; else decoded test points alone.
    """
    assert run.answers is not None
    chosen = run.answers["chosen"]
    decoded = (run.summary or {}).get("rules", {})
    calibrated = {} if run.calibration is None else run.calibration["rules"]
    if "lossless" in calibrated and _right(calibrated["lossless"]) is not None:
        series, points = _calibrated(calibrated, decoded.get(chosen, {}).get("dial"))
    else:
        series, points = [], {}
        for label, right in run.answers["right"].items():
            # The drafter alone, far below, would press everything else together; its accuracy stands in the text.
            if label in decoded and (label in NAMES or label == chosen):
                calls = decoded[label]["verifier_calls_per_token"]
                points[label] = {"calls": calls, "right": PERCENT * right}
    for label, point in points.items():
        name = NAMES.get(label, f"{CHOSEN}: {chosen}")
        colour = 2 if label in NAMES else 4
        series.append(Series(name, [point["calls"]], [point["right"]], colour=colour, kind="points"))
    return line_chart(
        "Right answers against verifier calls per token",
        series,
        "verifier calls per token",
        "right answers, %",
        labels=True,
    )


def _calibrated(
    rules: Mapping[str, Any], chosen: Mapping[str, Any] | None
) -> tuple[list[Series], dict[str, dict[str, float]]]:
    """Curves of the settings tried on the calibration questions; points of verifier, lossless and the chosen one.

    Lossless text is the verifier's own when greedy and of its distribution otherwise, so that the verifier alone has as
    many right answers, at one call a token.
    """
    series = []
    for colour, (name, settings) in enumerate(_curves(rules).items()):
        notes = [
            f"dial {nice(p['value'])}: {p['right']:.1f}% right, {nice(p['calls'])} calls" for p in settings
        ]
        xs, ys = [p["calls"] for p in settings], [p["right"] for p in settings]
        series.append(Series(name, xs, ys, colour=colour, notes=notes))
    lossless = _point(rules["lossless"])
    points = {"verifier_only": {**lossless, "calls": 1.0}, "lossless": lossless}
    same = (rule for rule in rules.values() if chosen is not None and rule.get("dial") == chosen)
    if (found := next(same, None)) is not None and _right(found) is not None:
        points[CHOSEN] = _point(found)
    return series, points


def _curves(rules: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Rule to its settings in the order of its dial, lossless behind the end that has more right answers."""
    families: dict[str, list[dict[str, float]]] = {}
    for label, rule in rules.items():
        if rule.get("dial") is not None and _right(rule) is not None:
            families.setdefault(label.rpartition(":")[0], []).append(_point(rule))
    for points in families.values():
        points.sort(key=lambda point: point["value"])
        if points[0]["right"] > points[-1]["right"]:
            points.reverse()
        points.append(_point(rules["lossless"]))
    return families


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
