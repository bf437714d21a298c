"""`fit` and `export` as commands: from traces to a served head, and one line for what is wrong."""

from pathlib import Path

import pytest
from training.conftest import FEATURES

from deferral_train.cli import main
from deferral_train.heads import DeferralHead, GapHead
from deferral_train.traces import open_traces
from deferral_train.training.checkpoint import read_checkpoint

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "fit"


def words(folders, out, *more):
    return [
        "fit",
        *("--model.head.class_path", "GapHead"),
        *("--model.head.init_args.features", f"[{','.join(FEATURES)}]"),
        *("--data.train", str(folders["train"])),
        *("--data.val", str(folders["val"])),
        *("--trainer.max_epochs", "1"),
        *("--trainer.enable_progress_bar", "false"),
        *("--out", str(out)),
        *more,
    ]


def test_fit_then_export_then_load(folders, tmp_path, capsys):
    assert main(words(folders, tmp_path / "fit", "--model.lr", "0.01")) == 0
    checkpoint = tmp_path / "fit" / "checkpoints" / "best.ckpt"
    assert "val/regret" in capsys.readouterr().out
    assert (tmp_path / "fit" / "fit.provenance.json").is_file()
    assert list((tmp_path / "fit" / "log").glob("events.*"))
    head, _ = read_checkpoint(checkpoint)
    assert (
        main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "head"), "--alpha", "0.2"])
        == 0
    )
    stored = DeferralHead.from_pretrained(tmp_path / "head")
    assert isinstance(stored, GapHead)
    assert stored.metadata["alpha"] == 0.2
    assert stored.metadata["cost"]["microseconds_per_token"] > 0
    assert stored.metadata["pair"]["drafter"].startswith("synthetic-drafter")
    assert "regret" in stored.metadata["evaluation"]["metrics"]
    summary = open_traces(folders["val"]).summary()
    assert (stored.gap(summary) == head.gap(summary)).all()


def test_help_starts_with_the_usage(capsys, recwarn):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert capsys.readouterr().out.startswith("usage: deferral-train fit")
    assert [str(warning.message) for warning in recwarn if "args parameter" in str(warning.message)] == []


@pytest.mark.parametrize(
    "config",
    # The judge needs labelled traces: docs/judges.md runs it.
    sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "judge"),
    ids=lambda path: path.stem,
)
def test_shipped_configs_run(config, folders, tmp_path):
    flags = ["--data.train", str(folders["train"]), "--out", str(tmp_path), "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", str(config), *flags, "--trainer.enable_progress_bar", "false"]) == 0
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--modle.lr", "1"], "modle"),
        (["--model.lr", "fast"], "lr"),
        (["--model.objective", "hinge"], "hinge"),
        (["--model.head.init_args.features", "[drafter_mx]"], "drafter_mx"),
        (["--data.alphas", "[0.0, 99.0]"], "alpha grid"),
        (["--data.truth", "teacher"], "teacher"),
        (["--data.train", "/nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_one_line_and_exit_two(folders, tmp_path, capsys, more, said):
    assert main(words(folders, tmp_path / "fit", *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not (tmp_path / "fit" / "checkpoints").exists()


def test_export_of_no_checkpoint(tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04K\x01.")
    assert main(["export", "--checkpoint", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "head")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.lr", "abc"], ['"model.lr"', "float", "abc"]),
        (["--model.head", "Nope"], ['"model.head"', "Nope"]),
        (["--data.colour", "blue"], ["--data.colour"]),
    ],
)
def test_a_wrong_flag_is_one_line_with_field_and_value(words, said, capsys):
    assert main(["fit", "--config", str(CONFIGS / "gap.yaml"), "--data.train", "x", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert all(part in error for part in said), error


def test_a_fit_without_a_head_says_what_is_missing(capsys):
    assert main(["fit", "--data.train", "x"]) == 2
    error = capsys.readouterr().err.strip()
    assert "model.head" in error
    assert "features" in error
