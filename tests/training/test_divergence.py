"""A fit that diverges says when, and neither a checkpoint nor a head is made of what it left."""

import math
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from training.test_bad_input import altered
from training.test_cli import words

from deferral_train.cli import main
from deferral_train.errors import InputError
from deferral_train.heads import GapHead
from deferral_train.heads.export import export_head
from deferral_train.rules import make_rule
from deferral_train.traces import open_traces
from deferral_train.training import fit as module
from deferral_train.training.checkpoint import read_checkpoint
from deferral_train.training.fit import fit
from deferral_train.training.scoring import score
from deferral_train.training.table import score_table

ALPHAS = (0.0, 0.5)


def poison(head):
    with torch.no_grad():
        next(p for p in head.parameters() if p.dim() > 1)[0, 0] = math.nan


class Poison(pl.Callback):
    """Turns a weight into NaN after some optimiser steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_step == self.step:
            poison(module.head)


@pytest.fixture
def poisoned(monkeypatch):
    make = module.make_trainer

    def after(step):
        monkeypatch.setattr(
            module, "make_trainer", lambda c, log, callbacks: make(c, log, [*callbacks, Poison(step)])
        )

    return after


@pytest.mark.parametrize("figures", ["0", "1"])
def test_a_rate_that_is_far_too_high_is_one_line(figures, folders, tmp_path, capsys):
    rate = ("--model.lr", "1e30", "--data.batch_size", "1000", "--model.figure_every", figures)
    assert main(words(folders, tmp_path, *rate)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    for part in (
        "diverged at step 2",
        "loss is nan",
        "lr=1e+30",
        "lower lr",
        "gradient_clip_val",
        "no checkpoint",
    ):
        assert part in last, part
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("step", "said"),
    [(15, "step 16 of epoch 1: the loss is nan"), (24, "val/regret is nan")],
    ids=["between two steps", "after the last step of an epoch"],
)
def test_the_best_checkpoint_before_it_is_kept_and_named(step, said, config, tmp_path, poisoned):
    """Twelve steps an epoch: the checkpoints of epoch 0 stay the bytes that they were."""
    kept = fit(replace(config, epochs=1, figure_every=0), tmp_path / "one")
    poisoned(step)
    with pytest.raises(InputError, match="diverged") as caught:
        fit(replace(config, figure_every=0, schedule="constant"), tmp_path / "two")
    best = tmp_path / "two" / "checkpoints" / "best.ckpt"
    assert said in str(caught.value)
    assert str(best) in str(caught.value)
    for name in ("best", "last"):
        head, scalars = read_checkpoint(best.with_name(f"{name}.ckpt"))
        assert all(torch.isfinite(value).all() for value in head.state_dict().values())
        assert math.isfinite(scalars["regret"])
    assert kept.checkpoint is not None


def test_weights_that_are_not_finite_reach_no_checkpoint(config, tmp_path, monkeypatch):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            poison(module.head)
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    make = module.make_trainer
    monkeypatch.setattr(module, "make_trainer", lambda c, log, callbacks: make(c, log, [*callbacks, Save()]))
    with pytest.raises(InputError, match=r"weight body.0.weight is not finite"):
        fit(replace(config, figure_every=0), tmp_path / "out")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_breaking_off_leaves_the_best_checkpoint_what_it_is(config, tmp_path, monkeypatch):
    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            if trainer.global_step == 15:
                raise OSError("broken off")

    make = module.make_trainer
    monkeypatch.setattr(module, "make_trainer", lambda c, log, callbacks: make(c, log, [*callbacks, Break()]))
    with pytest.raises(OSError, match="broken off"):
        fit(replace(config, figure_every=0), tmp_path)
    steps = {
        name: torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    assert steps == {"best": 12, "last": 15}


@pytest.mark.parametrize("kind", ["gap", "cost_sensitive"])
def test_the_scores_of_a_head_that_gives_nan_are_nan(kind, config, folders, tmp_path):
    """Not a number compares as false: without care such a head would seem to keep every draft, at a good regret."""
    result = fit(replace(config, head=kind, epochs=1, figure_every=0), tmp_path)
    traces = open_traces(folders["val"])
    rules = {name: [make_rule("opt", alpha=alpha) for alpha in ALPHAS] for name in ("opt", "plug_in")}
    table = score_table(traces, result.head, baselines=rules)
    good = score(result.head, table, ALPHAS)
    poison(result.head)
    bad = score(result.head, table, ALPHAS)
    assert good["not_finite"] == 0 < bad["not_finite"] <= len(traces)
    of_rules = {name for name, value in bad.items() if math.isfinite(value)}
    assert all(name.partition("@")[0].endswith(("_opt", "_plug_in", "not_finite")) for name in of_rules)
    assert not any("excess" in name or "disagreement" in name for name in of_rules)
    for name in of_rules - {"not_finite"}:
        assert bad[name] == good[name]
    for name in ("regret", "exact_regret", "hindsight_excess", "rejection_rate", "excess_over_opt"):
        assert math.isnan(bad[name]), name


def test_a_head_of_nan_weights_is_not_exported(config, tmp_path, capsys):
    result = fit(replace(config, epochs=1, figure_every=0), tmp_path / "fit")
    state = torch.load(result.checkpoint, weights_only=True)
    next(v for v in state["state_dict"].values() if v.dim() > 1)[0, 0] = math.nan
    torch.save(state, tmp_path / "nan.ckpt")
    assert main(["export", "--checkpoint", str(tmp_path / "nan.ckpt"), "--out", str(tmp_path / "head")]) == 2
    assert "not finite" in capsys.readouterr().err
    folder = export_head(result.head, tmp_path / "good")
    before = (folder / "model.safetensors").read_bytes()
    poison(result.head)
    with pytest.raises(InputError, match="not finite"):
        export_head(result.head, folder)
    assert not (tmp_path / "head").exists()
    assert (folder / "model.safetensors").read_bytes() == before
    assert GapHead.from_pretrained(folder).num_parameters == result.head.num_parameters


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_that_are_not_finite_are_refused_by_name(split, value, config, folders, tmp_path):
    known = open_traces(folders[split])
    column = known.column("truth_drafter_argmax").copy()
    column[7] = value
    wrong = altered(folders[split], tmp_path / "t", truth_drafter_argmax=column)
    with pytest.raises(InputError, match="label of the gap") as caught:
        fit(replace(config, truth="exact", **{split: wrong}), tmp_path / "out")
    assert known.manifest.prompt_ids[0] in str(caught.value)
    assert not (tmp_path / "out" / "checkpoints").exists()
