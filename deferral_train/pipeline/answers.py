"""The sentences that a run with questions says first, and the answers that it shows, with their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.evaluation.sql import RIGHT, SqlRunner, judge, reasons
from deferral_train.pipeline import ask
from deferral_train.pipeline.text import read_part

FILE = "evaluation/answers.json"
SHOWN, SHOWN_ROWS = 3, 6
VERIFIER, LOSSLESS, DRAFTER = "verifier_only", "lossless", "drafter_only"
Results = Mapping[str, Any]


def show_answers(folder: Path, chosen: str, constant: float, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``evaluation/answers.json``: share of right answers by rule and family, and three questions in full.

    Args:
        folder: of the run. chosen: label of the chosen setting in ``decode``.
        constant: share of the test questions that the best constant answer gets right.
        shapes: accuracy on the families that no part has, see ``online.decode_shapes``.

    Returns:
        ``right`` (rule to share), ``errors`` (rule to reason to count), ``questions`` (their number), ``constant``.
    """
    rows = [row for row in read_lines(folder / "decode" / OUTPUTS) if row["repetition"] == 0]
    database = ask.database_path(folder)
    verdicts = judge(database, [row["text"] for row in rows], [row["reference"] for row in rows])
    by_rule: dict[str, dict[str, str]] = {}
    for row, verdict in zip(rows, verdicts):
        by_rule.setdefault(row["rule"], {})[row["id"]] = verdict
    texts = {(row["rule"], row["id"]): row["text"] for row in rows}
    shown = _chosen_questions(by_rule, texts, chosen)
    questions = {prompt.id: prompt for prompt in read_part(folder, "test")}
    with SqlRunner(database) as runner:
        examples = [
            {
                "id": name,
                "question": questions[name].prompt,
                "reference": questions[name].reference,
                "answers": [
                    {
                        "rule": rule,
                        "verdict": by_rule[rule][name],
                        "text": texts[rule, name],
                        **_rows(runner, texts[rule, name]),
                    }
                    for rule in (VERIFIER, chosen)
                ],
            }
            for name in shown
        ]
    found = {
        "questions": len(by_rule[VERIFIER]),
        "right": {rule: _share(own.values()) for rule, own in by_rule.items()},
        "errors": {rule: reasons(own.values()) for rule, own in by_rule.items()},
        "constant": constant,
    }
    families = {rule: _by_family(own) for rule, own in by_rule.items()}
    provenance.write_json(
        folder / FILE,
        {**found, "families": families, "shapes": shapes, "chosen": chosen, "examples": examples},
    )
    return found


def _share(verdicts: Iterable[str]) -> float:
    own = list(verdicts)
    return sum(verdict == RIGHT for verdict in own) / len(own)


def _by_family(verdicts: Mapping[str, str]) -> dict[str, float]:
    """Share of right answers by the family that a question's id begins with."""
    families: dict[str, list[str]] = {}
    for name, verdict in verdicts.items():
        families.setdefault(name.partition("/")[0], []).append(verdict)
    return {family: _share(own) for family, own in families.items()}


def _chosen_questions(
    verdicts: Mapping[str, Mapping[str, str]], texts: Mapping[tuple[str, str], str], chosen: str
) -> list[str]:
    """Ids: another way of writing with the same rows, what the cascade loses, and one that it answers word for word.

    A kind that did not occur is made up for by the first questions of the others.
    """
    kinds: dict[str, list[str]] = {"written otherwise": [], "lost": [], "same": []}
    for name, verdict in verdicts[chosen].items():
        verifier, same = verdicts[VERIFIER][name], texts[chosen, name] == texts[VERIFIER, name]
        if verifier == RIGHT == verdict:
            kinds["same" if same else "written otherwise"].append(name)
        elif verifier == RIGHT:
            kinds["lost"].append(name)
    firsts = [own[0] for own in kinds.values() if own]
    more = [name for own in kinds.values() for name in own[1:]]
    return [*firsts, *more, *verdicts[chosen]][:SHOWN]


def _rows(runner: SqlRunner, text: str) -> dict[str, Any]:
    answer = runner.run(text)
    if answer.rows is None:
        return {"rows": None, "more": 0, "reason": ": ".join(filter(None, (answer.reason, answer.detail)))}
    return {"rows": answer.rows[:SHOWN_ROWS], "more": max(0, len(answer.rows) - SHOWN_ROWS), "reason": None}


def say(verdict: Mapping[str, Any], results: Results) -> list[str]:
    """The sentences a run ends in: time per answer and accuracy, what is certified, whether a head was needed."""
    decoded, chosen = results["decode"], verdict["chosen"]
    label = chosen["label"]
    right = results["answers"]["right"]
    milliseconds = {
        name: 1000 * decoded[name]["mean_output_tokens"] / decoded[name]["tokens_per_second"]
        for name in (VERIFIER, LOSSLESS, label)
    }
    speed = milliseconds[VERIFIER] / milliseconds[label]
    pace = f"{speed:.2f} times as fast as" if speed >= 1 else f"slower ({speed:.2f} times the speed) than"
    setting = f"{chosen['name']} at {chosen['parameter']}={chosen['value']:.3g}"
    asked, saved = results["answers"]["questions"], verdict["calls_saved"]["value"]
    each = {name: f"{right[name]:.1%} right in {milliseconds[name]:.0f} ms" for name in milliseconds}
    sentences = [
        f"Of {asked} new questions the large model alone (the verifier) answers {each[VERIFIER]} each; where a small "
        f"model writes ahead and every token is checked (lossless), {each[LOSSLESS]}; where the chosen rule lets some "
        f"of the small model's tokens stand ({setting}), {each[label]}: {pace} the large model alone, with "
        f"{saved:.0%} fewer of its passes per token."
    ]
    certificate = chosen.get("certificate")
    if certificate:
        sentences.append(
            f"Certified before these questions were asked: at most {100 * certificate['limit']:.1f} answers in a "
            f"hundred are lost by it against checking every token, with {certificate['confidence']:.0%} confidence, on "
            f"{certificate['prompts']} other questions."
        )
    else:
        sentences.append(f"No setting could be certified: {chosen['uncertified']}.")
    sentences.append(_on_the_head(chosen, results))
    return sentences


def _on_the_head(chosen: Mapping[str, Any], results: Results) -> str:
    """A sentence about whether the learned head was needed here."""
    if chosen["rule"] == "learned":
        return "A learned head decides; it needed fewer verifier calls than the best rule without one."
    return (
        f"A rule without training, {chosen['name']}, was enough here; where a learned head does better is in "
        "docs/results.md."
    )
