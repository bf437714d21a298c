"""Every parameter of Lightning's Trainer does what it says in a fit, or is refused by name in one line."""

import inspect
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.test_cli import words

from deferral_train.cli import main
from deferral_train.training.checkpoint import read_checkpoint
from deferral_train.training.flags import HONOURED, REFUSED

# Values that differ from the default and change nothing that can be seen from here but must not fail.
TAKEN = {
    "accelerator": "cpu",
    "devices": "1",
    "num_nodes": "1",
    "strategy": "auto",
    "precision": "bf16-mixed",
    "logger": "false",
    "min_epochs": "1",
    "max_epochs": "1",
    "min_steps": "1",
    "max_time": "00:01:00:00",
    "limit_val_batches": "1",
    "overfit_batches": "1",
    "val_check_interval": "0.5",
    "check_val_every_n_epoch": "5",
    "num_sanity_val_steps": "1",
    "log_every_n_steps": "1",
    "enable_progress_bar": "true",
    "enable_model_summary": "true",
    "accumulate_grad_batches": "2",
    "gradient_clip_val": "0.5",
    "deterministic": "false",
    "benchmark": "true",
    "inference_mode": "false",
    "profiler": "simple",
    "detect_anomaly": "true",
    "sync_batchnorm": "true",
    "reload_dataloaders_every_n_epochs": "1",
    "enable_autolog_hparams": "false",
    "callbacks": "LearningRateMonitor",
    "max_steps": "2",
    "limit_train_batches": "2",
}
TURNED_AWAY = {
    "strategy": "fsdp",
    "precision": "bf16-true",
    "barebones": "true",
    "enable_checkpointing": "false",
    "limit_val_batches": "0",
    "limit_train_batches": "0",
    "max_epochs": "0",
    "max_steps": "0",
    "limit_test_batches": "1",
    "limit_predict_batches": "1",
    "use_distributed_sampler": "true",
    "default_root_dir": "elsewhere",
    "model_registry": "name",
}
QUIET = ("--model.figure_every", "0", "--data.batch_size", "1000")


def events(folder: Path) -> EventAccumulator:
    log = EventAccumulator(str(folder / "log"), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    return log


def steps(folder: Path, tag: str) -> list[int]:
    return [event.step for event in events(folder).Scalars(tag)]


def test_every_parameter_of_the_trainer_is_treated():
    parameters = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert parameters == set(HONOURED) | set(REFUSED)
    assert not set(HONOURED) & set(REFUSED)
    tried = {*TAKEN, *TURNED_AWAY, "fast_dev_run", "gradient_clip_algorithm", "plugins"}
    assert parameters == tried, parameters ^ tried
    assert set(TURNED_AWAY) == set(REFUSED)


@pytest.mark.parametrize("name", TAKEN)
def test_a_flag_that_is_honoured_ends_with_a_checkpoint(name, folders, tmp_path, capsys):
    assert main(words(folders, tmp_path, *QUIET, f"--trainer.{name}", TAKEN[name])) == 0
    assert "best checkpoint" in capsys.readouterr().out
    read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_a_flag_that_is_refused_is_named(name, folders, tmp_path, capsys):
    assert main(words(folders, tmp_path, f"--trainer.{name}", TURNED_AWAY[name])) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"trainer.{name}=" in last
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trainer.accelerator", "gpuu"], "accelerator"),
        (["--trainer.devices", "0"], "devices"),
        (["--trainer.strategy", "nonsense"], "nonsense"),
        (["--trainer.profiler", "nonsense"], "profiler"),
        (["--trainer.val_check_interval", "300"], "val_check_interval"),
        (["--trainer.limit_val_batches", "0.001"], "limit_val_batches"),
        (["--trainer.gradient_clip_algorithm", "nonsense"], "nonsense"),
        (["--trainer.max_epochs", "-1"], "max_epochs"),
        (["--trainer.max_time", "00:00:00:00"], "max_time"),
        (["--patience", "-1"], "patience"),
    ],
)
def test_values_that_do_not_fit_are_one_line(more, said, folders, tmp_path, capsys):
    assert main(words(folders, tmp_path, *QUIET, *more)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert said in error[0]


def test_a_logger_of_the_users_own_replaces_the_log(folders, tmp_path):
    csv = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "csv"))
    assert main(words(folders, tmp_path / "a", *QUIET, *csv)) == 0
    assert "val/regret" in next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()[0]
    assert not list((tmp_path / "a").rglob("events.*"))
    assert main(words(folders, tmp_path / "b", *QUIET, "--trainer.logger", "false")) == 0
    assert not list((tmp_path / "b").rglob("events.*"))


def test_a_trial_run_keeps_nothing(folders, tmp_path, capsys):
    assert main(words(folders, tmp_path, "--trainer.fast_dev_run", "true")) == 0
    assert "no checkpoint" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.ckpt"))


def test_callbacks_of_the_users_own_work_beside_ours(folders, tmp_path):
    own = ("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", str(tmp_path / "mine"))
    assert main(words(folders, tmp_path / "fit", *QUIET, *own)) == 0
    assert len(list((tmp_path / "mine").glob("*.ckpt"))) == 1
    assert (tmp_path / "fit" / "checkpoints" / "best.ckpt").is_file()


def test_a_run_of_few_steps_is_validated_kept_and_logged(folders, tmp_path):
    """Two steps are less than an epoch: no validation comes by itself, and the head must still be there."""
    assert main(words(folders, tmp_path, "--data.batch_size", "1000", "--trainer.max_steps", "2")) == 0
    checkpoint = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert "regret" in checkpoint["deferral_scalars"]
    assert steps(tmp_path, "train/loss") == [0, 1]
    tags = events(tmp_path).Tags()
    assert {"val/regret", "hp/regret"} <= set(tags["scalars"])
    assert "val/regret_vs_alpha" in tags["images"]


def test_the_rate_decays_over_the_steps_that_are_run(folders, tmp_path):
    """A limit of batches shortens the run, and the schedule with it: cosine reaches 0 at the last step."""
    few = ("--data.batch_size", "300", "--trainer.limit_train_batches", "4", "--trainer.max_epochs", "2")
    assert main(words(folders, tmp_path, "--model.figure_every", "0", *few)) == 0
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 8
    assert state["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0, abs=1e-9)


def test_every_step_of_a_short_run_is_logged_and_a_rerun_draws_one_curve(folders, tmp_path):
    twelve = words(folders, tmp_path, "--data.batch_size", "250", "--model.figure_every", "0")
    assert main(twelve) == 0
    first = steps(tmp_path, "train/loss")
    assert first == list(range(12))
    assert main(twelve) == 0
    assert len(list((tmp_path / "log").glob("events.*"))) == 1
    assert steps(tmp_path, "train/loss") == first
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    assert main([*twelve, "--trainer.max_epochs", "2", "--ckpt_path", last]) == 0
    assert steps(tmp_path, "train/loss") == list(range(24))
    assert len(steps(tmp_path, "val/regret")) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.head.init_args.hidden", "[16]"], "model.head.hidden was [64, 64]"),
        (["--model.head.init_args.features", "[tv]"], "model.head.features"),
        (["--model.lr", "1e-5"], "model.lr was 0.003"),
        (["--data.seed", "3"], "seed was 0"),
        (["--data.truth", "exact"], "data.truth"),
    ],
)
def test_resuming_with_other_settings_is_refused(more, said, folders, tmp_path, capsys, begun):
    assert main(words(folders, tmp_path, *QUIET, *more, "--ckpt_path", str(begun))) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture(scope="module")
def begun(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("begun")
    assert main(words(folders, out, *QUIET)) == 0
    return out / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("damage", ["absent", "cut", "empty", "text", "folder", "weights"])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(damage, folders, tmp_path, capsys, begun):
    path, data = tmp_path / "x.ckpt", begun.read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "weights":
        state = torch.load(begun, weights_only=True)
        torch.save({key: state[key] for key in ("state_dict", "deferral_head")}, path)
    elif damage != "absent":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"{}"}[damage])
    assert main(words(folders, tmp_path / "fit", *QUIET, "--ckpt_path", str(path))) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "x.ckpt" in errors[0]
    assert not (tmp_path / "fit" / "checkpoints").exists()


def test_nothing_is_advertised_at_the_start(folders, tmp_path, capfd, caplog):
    assert main(words(folders, tmp_path, *QUIET)) == 0
    said = "".join(capfd.readouterr()) + caplog.text
    assert "litlogger" not in said
    assert "litmodels" not in said


def test_the_settings_on_record_can_be_run_again(folders, tmp_path):
    """config.yaml holds every flag: none of the values that a fit writes itself may be refused."""
    assert main(words(folders, tmp_path / "a", *QUIET)) == 0
    again = ["fit", "--config", str(tmp_path / "a" / "log" / "config.yaml"), "--out", str(tmp_path / "b")]
    assert main(again) == 0
    record = json.loads((tmp_path / "b" / "fit.provenance.json").read_text())
    assert record["seeds"] == {"seed": 0} or record
