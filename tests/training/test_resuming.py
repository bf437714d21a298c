"""A fit goes on only under the settings, traces and initial weights that its checkpoint was made with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training.trace_maker import small_language, write_traces

from deferral_train import cli, provenance
from deferral_train.errors import InputError
from deferral_train.heads.fingerprint import weights_key
from deferral_train.training.checkpoint import load_checkpoint
from deferral_train.training.fit import fit
from deferral_train.training.resuming import RECORD, found_here


@pytest.fixture
def folder(fitted, tmp_path) -> Path:
    shutil.copytree(fitted[1], tmp_path / "fit")
    return tmp_path / "fit"


def checkpoints(folder: Path) -> dict[str, str]:
    return {path.name: provenance.sha256(path) for path in (folder / "checkpoints").iterdir()}


def test_the_same_fit_is_taken_up(fitted, config, folder):
    assert weights_key(fit(config, folder).head) == weights_key(fitted[0].head)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.1}, "settings.lr: 0.01 -> 0.1"),
        ({"seed": 1}, "settings.seed: 0 -> 1"),
        ({"hidden": (4,)}, "settings.hidden"),
        ({"truth": "verifier"}, "settings.truth: reference -> verifier"),
        ({"epochs": 5}, "settings.epochs: 3 -> 5"),
    ],
)
def test_other_settings_are_refused_and_the_checkpoint_stays(config, folder, changes, said):
    before = checkpoints(folder)
    with pytest.raises(
        InputError, match="resume=False or --fresh starts over, another folder keeps both"
    ) as caught:
        fit(replace(config, **changes), folder)
    assert said in str(caught.value)
    assert checkpoints(folder) == before


def test_starting_over_gives_what_an_empty_folder_gives(config, folder, tmp_path):
    other = replace(config, lr=0.1)
    anew = fit(other, folder, resume=False).head
    assert weights_key(anew) == weights_key(fit(other, tmp_path / "empty").head)
    assert weights_key(fit(other, folder).head) == weights_key(anew)


def test_traces_of_another_content_in_the_same_folder_are_seen(config, folder, tmp_path):
    shutil.copytree(config.train, tmp_path / "train")
    moved = replace(config, train=str(tmp_path / "train"))
    fit(moved, folder)  # elsewhere, the same contents
    shutil.rmtree(tmp_path / "train")
    write_traces(tmp_path / "train", small_language(), 120, 25, 7)
    with pytest.raises(InputError, match=r"traces\.train"):
        fit(moved, folder)


def test_other_initial_weights_are_seen(fitted, config, folder, monkeypatch):
    monkeypatch.setattr("deferral_train.training.fit.make_head", lambda *_: fitted[0].head)
    with pytest.raises(InputError, match="initial"):
        fit(config, folder)


def test_a_fit_of_an_earlier_release_is_not_silently_taken(config, folder):
    (folder / RECORD).unlink()
    with pytest.raises(InputError, match="does not record what it was made from"):
        fit(config, folder)


def test_a_second_fit_in_the_folder_is_told_at_once(config, folder):
    with provenance.one_writer(folder, "fit"), pytest.raises(InputError, match="another fit is working"):
        fit(config, folder)


def words(folders, out, *more):
    return [
        "fit", "--data.train", str(folders["train"]), "--data.val", str(folders["val"]), "--out", str(out),
        "--model.head.class_path", "GapHead", "--model.head.init_args.features", "[drafter_max, verifier_max, tv]",
        "--model.head.init_args.hidden", "[4]", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", *more,
    ]  # fmt: skip


def test_the_command_resumes_under_the_checkpoints_settings_and_traces_alone(folders, tmp_path, capsys):
    assert cli.main(words(folders, tmp_path / "a")) == 0
    again = ["--ckpt_path", str(tmp_path / "a" / "checkpoints" / "last.ckpt"), "--trainer.max_epochs", "2"]
    for more, said in (
        (["--model.lr", "1e-5"], "model.lr was 0.003 there and is 1e-05 here"),
        (["--data.train", str(folders["test"])], "contents of data.train was"),
        (
            ["--trainer.accumulate_grad_batches", "2"],
            "trainer.accumulate_grad_batches was 1 there and is 2 here",
        ),
        (["--trainer.gradient_clip_val", "0.1"], "trainer.gradient_clip_val was null there and is 0.1 here"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision was"),
        (["--trainer.limit_train_batches", "1"], "trainer.limit_train_batches was 1.0 there and is 1 here"),
    ):
        capsys.readouterr()
        assert cli.main(words(folders, tmp_path / "b", *again, *more)) == 2
        assert said in capsys.readouterr().err
    assert cli.main(words(folders, tmp_path / "b", *again)) == 0
    capsys.readouterr()
    at_its_end = [
        "--ckpt_path",
        str(tmp_path / "b" / "checkpoints" / "last.ckpt"),
        "--trainer.max_epochs",
        "2",
    ]
    assert cli.main(words(folders, tmp_path / "b", *at_its_end)) == 0
    assert "nothing was left to train" in capsys.readouterr().out
    with provenance.one_writer(tmp_path / "c", "fit"):
        assert cli.main(words(folders, tmp_path / "c")) == 2
    assert "another fit is working" in capsys.readouterr().err


def test_a_checkpoint_of_another_fit_is_not_taken_for_this_ones(config, folder, tmp_path):
    other = fit(replace(config, seed=5), tmp_path / "other")
    for name in ("best.ckpt", "last.ckpt"):
        shutil.rmtree(folder)
        fit(config, folder)
        shutil.copy(other.checkpoint.with_name(name), folder / "checkpoints" / name)
        with pytest.raises(InputError, match=f"{name} was written by another fit"):
            fit(config, folder)


def test_a_best_checkpoint_that_is_gone_is_missed(config, folder):
    (folder / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(InputError, match="is gone; resume=False or --fresh starts over"):
        fit(config, folder)


def test_a_folder_that_was_copied_reads_nothing_of_the_place_it_came_from(config, folder, tmp_path):
    shutil.move(folder, tmp_path / "there")
    moved = fit(config, tmp_path / "there")
    assert moved.checkpoint == tmp_path / "there" / "checkpoints" / "best.ckpt"
    callbacks = load_checkpoint(moved.checkpoint.with_name("last.ckpt"))["callbacks"]
    state = next(value for key, value in callbacks.items() if key.startswith("ModelCheckpoint"))
    found_here(state, moved.checkpoint.parent)
    assert {Path(path).parent for path in state["best_k_models"]} == {moved.checkpoint.parent}
