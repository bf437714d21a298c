"""evaluate, choose and report as users call them: files, exit codes, one line on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deferral_train import DeferralHead, cli
from deferral_train.heads.gap import GapHead
from deferral_train.provenance import write_text
from deferral_train.traces import Traces
from evaluation.language import VOCABULARY, Language


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, language: Language) -> Path:
    root = tmp_path_factory.mktemp("commands")
    language.write(root / "traces", 0.0, VOCABULARY)
    head = GapHead(["drafter_max", "verifier_max", "tv"], hidden=[4])
    head.save_pretrained(root / "head")
    return root


def rows(prompts: int = 400) -> str:
    """Outputs of lossless and of the head at two alphas, the second harmful."""
    lines = []
    for label, wrong, calls in (
        ("lossless", 0, 10),
        ("learned:alpha=0.1", 2, 7),
        ("learned:alpha=0.5", 90, 4),
    ):
        for number in range(prompts):
            counts = {"verifier_calls": calls, "emitted": 20}
            text = "no" if number < wrong else "yes"
            lines.append(
                {"id": f"p{number}", "rule": label, "repetition": 0, "text": text, "reference": "yes"}
            )
            lines[-1]["counts"] = counts
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_evaluate_then_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "run" / "evaluation"
    command = [
        "evaluate",
        f"--traces=[{folder / 'traces'}]",
        f"--rules=[opt, learned:head={folder / 'head'}]",
    ]
    command += ["--grid=7", "--bootstrap=50", "--figures=false", f"--out={out}"]
    assert cli.main(command) == 0
    assert "learned" in capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert {point["rule"] for point in scores["points"]} >= {
        "opt",
        f"learned:head={folder / 'head'}",
        "oracle",
    }
    assert (out / "evaluate.provenance.json").exists()
    assert cli.main(["report", str(folder / "run")]) == 0
    assert (folder / "run" / "report.html").stat().st_size < 3_000_000


def test_a_head_of_another_vocabulary_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = GapHead(["drafter_max", "tv"], hidden=[4])
    head.metadata = {"pair": {"tokenizer": "another", "vocab_size": 7}, "alpha": 0.1}
    head.save_pretrained(tmp_path / "head")
    command = ["evaluate", f"--traces={folder / 'traces'}", "--bootstrap=0", f"--out={tmp_path / 'out'}"]
    assert cli.main([*command, "--rules", f"learned:head={tmp_path / 'head'}"]) == 2
    assert "another vocabulary (tokenizer is t, the head's another)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_choose_finds_the_setting_of_rows_and_certifies_no_head_by_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(folder / "decode" / "outputs.jsonl", rows())
    command = ["choose", f"--outputs={folder / 'decode'}", "--metric=exact_match", "--max_loss=0.05"]
    assert cli.main([*command, f"--head={folder / 'head'}", f"--out={folder / 'choice'}"]) == 2
    assert "hold no run.json" in capsys.readouterr().err
    assert "certificate" not in DeferralHead.from_pretrained(folder / "head").metadata
    assert cli.main([*command, f"--out={folder / 'choice'}"]) == 0
    said = capsys.readouterr().out
    assert "learned:alpha=0.1" in said
    assert "they can certify no less than" in said
    assert json.loads((folder / "choice" / "choice.json").read_text())["kind"] == "certificate"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["choose"], "give either outputs"),
        (["choose", "--outputs=nowhere", "--max_loss=0.1"], "holds no outputs.jsonl"),
        (["choose", "--traces=[nowhere]"], "give max_token_risk and a rule or a head"),
        (["evaluate", "--traces=[nowhere]"], "is not a trace folder"),
        (
            ["evaluate", "--traces=[x]", "--drafter_seconds=1"],
            "give both drafter_seconds and verifier_seconds",
        ),
        (["report", "nowhere"], "does not exist"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_too_small_a_loss_names_the_smallest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(folder / "few" / "outputs.jsonl", rows(30))
    assert cli.main(["choose", f"--outputs={folder / 'few'}", "--metric=exact_match", "--max_loss=0.01"]) == 2
    assert "the smallest loss that they can certify" in capsys.readouterr().err


def test_token_risk_from_traces(folder: Path, traces: Traces, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "choose",
        f"--traces=[{folder / 'traces'}]",
        "--rule=opt",
        "--max_token_risk=0.08",
        "--confidence=0.9",
    ]
    assert cli.main(command) == 0
    assert "certified for local tokens only" in capsys.readouterr().out


def test_damaged_outputs_are_named_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outputs.jsonl").write_text(rows(12) + "{broken\n")
    assert cli.main(["choose", "--outputs", str(tmp_path), "--max-verifier-calls", "0.9"]) == 2
    assert "outputs.jsonl, line 37 is no JSON" in capsys.readouterr().err
