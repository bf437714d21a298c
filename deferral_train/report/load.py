"""Read a run folder and assert what must hold: a report of numbers that do not add up cannot be made.

Every file is optional; a file that is there must be right.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deferral_train.decoding.outputs import read_lines
from deferral_train.errors import InputError
from deferral_train.evaluation.frontier import VERIFIER, FrontierPoint, table2
from deferral_train.provenance import read_object
from deferral_train.redaction import redacted
from deferral_train.report.shadow import Sums, find_shadow

TOLERANCE = 1e-4  # of sums of float32 columns
RATES = ("acceptance", "deferral rate", "reached", "failure rate", "share of positions")  # of breakdowns
EMITTED = ("kept", "accepted", "unverified", "resampled", "bonus")
PROPOSED = ("kept", "accepted", "unverified", "rejected", "discarded")


@dataclass(frozen=True)
class RunFolder:
    """The files of a run folder, read; None or empty where a part was not run.

    Attributes:
        folder: the run's folder.
        verdict: ``verdict.json``.
        scores: ``evaluation/scores.json``.
        skew: ``evaluation/skew.json``.
        frontier: ``evaluation/frontier.json``.
        breakdowns: ``evaluation/breakdowns.json``.
        shadow: counts of a serving engine's shadow mode, by rule.
        prefixes: ``evaluation/prefixes.json``, logged prefixes for the alpha slider.
        rounds: ``rounds/rounds.json`` of a run, or ``rounds.json`` of the `rounds` command.
        summary: ``decode/summary.json``.
        provenance: ``run.json``, or the record of the `decode` command where there was no whole run.
        answers: ``evaluation/answers.json`` of a run with questions.
        calibration: ``calibration/summary.json``, the settings that a certificate was looked for among.
        engine: ``engine/summary.json``, of the same prompts decoded by a serving engine.
        engine_outputs: rows of ``engine/outputs.jsonl``.
        outputs: rows of ``decode/outputs.jsonl``.
        timed_outputs: rows of ``timing/outputs.jsonl``, prompts decoded again one by one.
        batches: rows of ``timing/batches.jsonl``, else of ``decode/batches.jsonl``.
        training: scalar curves of the fit, tag to [(step, value)].
    """

    folder: Path
    verdict: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    skew: dict[str, Any] | None = None
    frontier: dict[str, Any] | None = None
    breakdowns: dict[str, Any] | None = None
    rounds: dict[str, Any] | None = None
    shadow: dict[str, Sums] = field(default_factory=dict)
    prefixes: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    answers: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    engine_outputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    timed_outputs: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def load_run(folder: str | Path, shadow: str | Path | None = None) -> RunFolder:
    """Read a run folder.

    Args:
        shadow: file or folder of a serving engine's shadow mode, beside what the folder holds itself.

    Raises:
        InputError: no such folder, nothing to report in it, a file that is no JSON, or numbers that break an
            identity; the message names the file and the identity.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"run folder {root} does not exist; give the --out of `run` or `quickstart`")
    verdict = _json(root / "verdict.json")
    timed = "timing" if (root / "timing" / "batches.jsonl").is_file() else "decode"
    run = RunFolder(
        root,
        verdict=verdict,
        scores=_json(root / "evaluation" / "scores.json"),
        skew=_json(root / "evaluation" / "skew.json"),
        frontier=_json(root / "evaluation" / "frontier.json"),
        breakdowns=_json(root / "evaluation" / "breakdowns.json"),
        rounds=_json(root / "rounds" / "rounds.json") or _json(root / "rounds.json"),
        shadow=find_shadow(root, shadow),
        prefixes=_json(root / "evaluation" / "prefixes.json"),
        summary=_json(root / "decode" / "summary.json"),
        provenance=redacted(_json(root / "run.json") or _json(root / "decode" / "decode.provenance.json")),
        outputs=list(read_lines(root / "decode" / "outputs.jsonl")),
        timed_outputs=list(read_lines(root / "timing" / "outputs.jsonl")),
        answers=_json(root / "evaluation" / "answers.json"),
        calibration=_json(root / "calibration" / "summary.json"),
        engine=_json(root / "engine" / "summary.json"),
        engine_outputs=list(read_lines(root / "engine" / "outputs.jsonl")),
        batches=list(read_lines(root / timed / "batches.jsonl")),
        training=read_training(root / _training_folder(verdict)),
    )
    if not any(
        (
            run.verdict,
            run.scores,
            run.frontier,
            run.breakdowns,
            run.rounds,
            run.shadow,
            run.summary,
            run.engine,
            run.training,
        )
    ):
        raise InputError(
            f"run folder {root} holds nothing to report: none of verdict.json, evaluation/scores.json, "
            "decode/summary.json, fit/, rounds.json, shadow.json; "
            "run `deferral-train evaluate` or `decode` into it first"
        )
    check(run)
    return run


def _training_folder(verdict: Mapping[str, Any] | None) -> str:
    """Where the event file lies, below the run folder whatever a verdict from elsewhere says."""
    named = str((verdict or {}).get("training") or "fit")
    return (
        named
        if Path(named).parts and ".." not in Path(named).parts and not Path(named).is_absolute()
        else "fit"
    )


def check(run: RunFolder) -> None:
    """Assert every identity; raises InputError naming file and identity."""
    evaluation, decode = run.folder / "evaluation", run.folder / "decode"
    checks = [
        (run.scores, check_scores, evaluation / "scores.json"),
        (run.frontier, check_frontier, evaluation / "frontier.json"),
        (run.breakdowns, check_breakdowns, evaluation / "breakdowns.json"),
        (run.outputs, check_outputs, decode / "outputs.jsonl"),
        (run.engine_outputs, check_outputs, run.folder / "engine" / "outputs.jsonl"),
    ]
    for found, checked, path in checks:
        if found is not None:
            with readable(path):
                checked(found, path)  # type: ignore[operator]
    decoded = ((run.summary, run.outputs, decode), (run.engine, run.engine_outputs, run.folder / "engine"))
    for summary, outputs, folder in decoded:
        if summary is not None and outputs:
            with readable(folder / "summary.json"):
                check_summary(summary, outputs, folder / "summary.json")


def check_scores(scores: Mapping[str, Any], path: Path) -> None:
    """Rates lie in their ranges; regret = priced risk - priced risk of the oracle, and is not negative."""
    block = scores["meta"]["num_draft_tokens"] + 1
    for point in scores["points"]:
        where = f"{path}: {point['rule']} at {point['parameter']}={point['value']}"
        for name in ("deferral_rate", "rejection_rate"):
            _require(-TOLERANCE <= _value(point, name, 0.0) <= 1 + TOLERANCE, where, f"0 <= {name} <= 1")
        calls = _value(point, "calls_per_token", 1.0)
        _require(
            1 / block - TOLERANCE <= calls <= 1 + TOLERANCE, where, "1/(block+1) <= calls_per_token <= 1"
        )
        _check_regret(point, where)
        for name, number in point.items():
            if isinstance(number, Mapping) and number["low"] is not None:
                _require(number["low"] <= number["high"], where, f"low <= high of {name}")


def _check_regret(point: Mapping[str, Any], where: str) -> None:
    name = "regret" if "regret" in point else "hindsight_excess"
    if name not in point:
        return
    regret = point[name]["value"]
    _require(regret >= -TOLERANCE, where, f"{name} >= 0")
    if "risk" in point:
        priced = point["risk"]["value"] + point["value"] * point["rejection_rate"]["value"]
        expected = priced - point["oracle_priced_risk"]["value"]
        _require(
            math.isclose(regret, expected, abs_tol=TOLERANCE * (1 + abs(point["value"]))),
            where,
            f"{name} = risk + alpha * rejection - oracle on the same tokens ({regret:.6g} and {expected:.6g})",
        )


def check_frontier(frontier: Mapping[str, Any], path: Path) -> None:
    """Rates lie in their ranges, the verifier alone is the unit of latency, Table 2 follows from the points."""
    for entry in frontier["entries"]:
        where = f"{path}: temperature {entry['temperature']:g}"
        points = {name: [FrontierPoint(**point) for point in line] for name, line in entry["points"].items()}
        alone = points[VERIFIER][0].latency
        _require(math.isclose(alone, 1.0, rel_tol=1e-6), where, f"latency of {VERIFIER} = 1")
        for point in (point for line in points.values() for point in line):
            for name in ("deferral_rate", "rejection_rate", "calls_per_token"):
                _require(0 <= getattr(point, name) <= 1, f"{where}, {point.label}", f"0 <= {name} <= 1")
        _require(table2(points) == entry["table2"], where, "Table 2 follows from the points")


def check_breakdowns(breakdowns: Mapping[str, Any], path: Path) -> None:
    """Every number lies within its limits, every rate and share in [0, 1]; quantities per token or call do not."""
    for table in breakdowns["tables"]:
        for row in table["rows"]:
            where = f"{path}: {table['name']}, {row['group']}"
            for name, number in row["numbers"].items():
                if number["low"] is not None:
                    _require(number["low"] <= number["high"], where, f"low <= high of {name}")
                if name in RATES:
                    _require(-TOLERANCE <= number["value"] <= 1 + TOLERANCE, where, f"0 <= {name} <= 1")


def check_outputs(outputs: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Counts of every row add up, and agree with its tokens."""
    for row in outputs:
        counts, where = row["counts"], f"{path}: {row['rule']}, prompt {row['id']}"
        parts = sum(counts[name] for name in PROPOSED)
        _require(
            counts["drafted"] == parts, where, "drafted = kept + accepted + unverified + rejected + discarded"
        )
        emitted = sum(counts[name] for name in EMITTED)
        _require(
            counts["emitted"] == emitted, where, "emitted = kept + accepted + unverified + resampled + bonus"
        )
        _require(emitted == len(row["tokens"]) == len(row["origin"]), where, "emitted = number of tokens")
        _require(
            counts["deferred"] <= counts["decided"] <= counts["drafted"],
            where,
            "deferred <= decided <= drafted",
        )


def check_summary(summary: Mapping[str, Any], outputs: list[dict[str, Any]], path: Path) -> None:
    """Totals of each rule are the sums over its rows, and rates their ratios."""
    for label, rule in summary["rules"].items():
        rows = [row for row in outputs if row["rule"] == label]
        if not rows:
            continue
        for name, total in rule["counts"].items():
            _require(
                total == sum(row["counts"][name] for row in rows),
                f"{path}: {label}",
                f"{name} = sum over outputs",
            )
        counts = rule["counts"]
        if counts["verifier_calls"]:
            length = counts["emitted"] / counts["verifier_calls"]
            _require(
                math.isclose(rule["mean_acceptance_length"], length, rel_tol=1e-6),
                f"{path}: {label}",
                "mean_acceptance_length = emitted / verifier_calls",
            )


def _require(holds: bool, where: str, identity: str) -> None:
    if not holds:
        raise InputError(f"{where}: the identity `{identity}` does not hold; run that stage again")


def _value(point: Mapping[str, Any], name: str, default: float) -> float:
    return point[name]["value"] if name in point else default


def _json(path: Path) -> dict[str, Any] | None:
    return read_object(path, "run that stage again")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within, a field that is absent or of another kind is one line that names the file: files may come from elsewhere.

    Raises:
        InputError: naming ``path``.
    """
    try:
        yield
    except InputError:
        raise
    except OSError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise InputError(f"{path} is damaged ({reason}); run that stage again") from error


def read_training(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag to [(step, value)] of the newest event folder under ``folder``; empty where there is none."""
    events = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not events:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(
        str(events[-1].parent), size_guidance={"scalars": 0, "images": 1, "histograms": 1}
    )
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]
    }
