import json
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead
from deferral_train.rules import make_rule, risks
from deferral_train.rules.learned import LearnedRule
from deferral_train.traces import open_traces, truth
from deferral_train.training.checkpoint import read_checkpoint
from deferral_train.training.fit import fit

NAMED = (
    *("regret", "exact_regret_opt", "excess_over_opt", "excess_over_plug_in", "hindsight_excess", "auroc"),
    *("gap_ece", "gap_brier", "disagreement_with_opt", "rejection_rate", "relative_risk"),
    *("alpha/exact_regret@0.5", "position/exact_regret@4", "stage/verify/regret"),
)


def test_fit_finds_a_head_below_opt_and_records_it(fitted, config):
    result, out = fitted
    assert result.metrics["exact_regret"] == result.metrics["regret"] < result.metrics["exact_regret_opt"]
    record = json.loads((out / "fit.json").read_text())
    assert record["metrics"]["regret"] == result.metrics["regret"]
    assert record["config"]["hidden"] == [8]
    assert set(record["plug_in_chosen"]) == {str(a) for a in config.alphas}
    assert result.head.metadata["pair"] == dict(open_traces(config.train).manifest.pair)
    assert result.head.metadata["training"]["rows"] == 3000


def test_logged_regret_is_that_of_the_rule_on_the_traces(fitted, config):
    """The whole way again by other means: stored head, LearnedRule, brute-force regret."""
    result, out = fitted
    head = DeferralHead.from_pretrained(result.head.save_pretrained(out / "head"))
    traces = open_traces(config.val)
    summary, gap = traces.summary(), truth.gap(traces, "exact")
    rules = {
        "exact_regret": lambda a: LearnedRule(head=head, alpha=a),
        "exact_regret_opt": lambda a: make_rule("opt", alpha=a),
    }
    for name, make in rules.items():
        found = [
            risks.regret(gap, summary["tv"], make(a).defer(summary), a).double().mean() for a in config.alphas
        ]
        np.testing.assert_allclose(np.mean(found), result.metrics[name], rtol=1e-4, atol=1e-9)


def test_checkpoint_is_the_head_and_holds_no_pickled_objects(fitted):
    result, _ = fitted
    head, scalars = read_checkpoint(result.checkpoint)
    assert scalars["regret"] == result.metrics["regret"]
    assert all(
        torch.equal(a, b) for a, b in zip(head.state_dict().values(), result.head.state_dict().values())
    )
    with pytest.raises(InputError, match="no checkpoint"):
        read_checkpoint(__file__)


def test_same_seed_same_weights_other_seed_others(config, fitted, tmp_path):
    again = fit(config, tmp_path / "a").head.state_dict()
    other = fit(replace(config, seed=1, epochs=1), tmp_path / "b").head.state_dict()
    first = fitted[0].head.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["body.0.weight"], other["body.0.weight"])


@pytest.mark.parametrize("settings", [{}, {"head": "cost_sensitive"}], ids=["gap", "cost_sensitive"])
def test_resuming_in_the_middle_of_an_epoch_gives_the_same_weights(config, tmp_path, settings, warm):
    """A process killed in epoch 1 (of 3) goes on from its last checkpoint, taken between two steps of that
    epoch.
    """
    wanted = fit(replace(config, **settings), tmp_path / "whole").head
    script = (
        "import os, signal, sys\n"
        "import pytorch_lightning as pl\n"
        "from deferral_train.training import fit as module\n"
        "from deferral_train.training.config import FitConfig\n"
        "class Kill(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        if trainer.global_step == 17:\n"
        "            trainer.save_checkpoint(sys.argv[2] + '/checkpoints/last.ckpt')\n"
        "        if trainer.global_step == 19:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "make = module.make_trainer\n"
        "module.make_trainer = lambda c, l, callbacks: make(c, l, [*callbacks, Kill()])\n"
        "module.fit(FitConfig(**eval(sys.argv[1])), sys.argv[2])\n"
    )
    changed = replace(config, **settings)
    out = tmp_path / "killed"
    done = subprocess.run([warm.python, "-c", script, repr(vars(changed)), str(out)], timeout=240)
    assert done.returncode == -signal.SIGKILL
    last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (1, 17)
    found = fit(changed, out).head
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_tensorboard_holds_scalars_figures_histograms_and_hparams(fitted):
    result, _ = fitted
    events = EventAccumulator(str(result.log_dir), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    for name in NAMED:
        assert f"val/{name}" in tags["scalars"], name
    logged = [event.value for event in events.Scalars("val/regret")]
    assert len(logged) == 3
    np.testing.assert_allclose(min(logged), result.metrics["regret"], rtol=1e-5)
    for name in ("regret_vs_alpha", "risk_vs_rejection", "reliability_gap"):
        images = events.Images(f"val/{name}")
        assert len(images) == 3
        assert images[0].encoded_image_string.startswith(b"\x89PNG")
    assert events.Histograms("val/gap")
    plugins = {tag for tag in events.summary_metadata if tag.startswith("_hparams_")}
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= plugins
    np.testing.assert_allclose(events.Scalars("hp/regret")[0].value, logged[-1], rtol=1e-5)


def test_early_stopping_on_regret(config, tmp_path):
    result = fit(replace(config, lr=0.0, epochs=20, patience=2, figure_every=0), tmp_path)
    assert result.epochs == 3


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_sixteen_bit(config, fitted, tmp_path, precision):
    result = fit(replace(config, precision=precision, figure_every=0), tmp_path)
    assert result.metrics["regret"] < result.metrics["exact_regret_opt"]
    assert next(result.head.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "truth_mixture", "body": "linear"},
        {"head": "token"},
        {"head": "token", "loss": "prob"},
        {"head": "gap", "objective": "cost_sensitive"},
        {"head": "gap", "objective": "huber", "loss": "log"},
        {"head": "gap", "recalibration": "isotonic"},
        {"head": "gap", "truth": "verifier", "loss": "prob"},
        {"head": "gap", "temperature": 0.0},
        {"head": "gap", "stage": "draft", "features": ()},
        {"head": "cost_sensitive", "stage": "draft", "features": ("drafter_max",)},
        {"head": "plug_in", "recalibration": "platt"},
        {"head": "ridge"},
        {"head": "logistic"},
        {"head": "boosting"},
    ],
    ids=lambda settings: "-".join(str(v) for v in settings.values()),
)
def test_every_head_and_objective_fits_and_is_scored(config, tmp_path, settings):
    result = fit(replace(config, epochs=1, figure_every=0, **settings), tmp_path)
    assert np.isfinite(result.metrics["regret"])
    assert result.metrics["excess_over_opt"] < 1


def test_ridge_baseline_is_scikit_learns(config, tmp_path):
    head = fit(replace(config, head="ridge"), tmp_path).head
    train, val = open_traces(config.train), open_traces(config.val)
    x, z = head.columns(train.summary()), truth.gap(train)
    rows = head.inputs.column(x, "argmaxes_differ") > 0
    wanted = Ridge(alpha=1.0).fit(head.prepare(x[rows]).numpy(), z[rows].numpy())
    seen = head.columns(val.summary())
    expected = (
        wanted.predict(head.prepare(seen).numpy()) * head.inputs.column(seen, "argmaxes_differ").numpy()
    )
    np.testing.assert_allclose(head.gap(val.summary()).numpy(), expected, atol=1e-5)
    with pytest.raises(InputError, match="torch only"):
        head.save_pretrained(tmp_path / "head")


def test_plug_in_without_recalibration_has_no_excess_over_opt(config, tmp_path):
    result = fit(replace(config, head="plug_in"), tmp_path)
    assert result.metrics["excess_over_opt"] == 0
    assert result.metrics["disagreement_with_opt"] == 0
    assert result.metrics["exact_regret"] == result.metrics["exact_regret_opt"]


def test_split_by_prompt_when_no_validation_is_given(config, tmp_path):
    result = fit(replace(config, val=None, val_fraction=0.25, epochs=1), tmp_path)
    assert result.head.metadata["training"]["prompts"] == 90


def test_several_trace_folders_are_fitted_together(config, folders, tmp_path):
    """The union of two halves is the whole: same rows, same number of steps, and shared prompts stay refused."""
    traces = open_traces(config.train)
    halves = [traces.select_prompts(traces.prompt_ids[:50]), traces.select_prompts(traces.prompt_ids[50:])]
    head = fit(replace(config, train=halves, epochs=1, figure_every=0), tmp_path / "a").head
    assert head.metadata["training"]["rows"] == 3000
    whole = fit(replace(config, epochs=1, figure_every=0), tmp_path / "b").head
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value)
    with pytest.raises(InputError, match="both train and val"):
        fit(replace(config, train=[config.train, str(folders["val"])]), tmp_path / "c")
    with pytest.raises(InputError, match="memory"):
        fit(replace(config, train=halves, features=("tv", "memory_1")), tmp_path / "d")
    apart = fit(replace(config, train=halves, val=None, val_fraction=0.2, epochs=1), tmp_path / "e").head
    assert apart.metadata["training"]["prompts"] == 120 - 10


def test_memory_is_counted_before_the_tables_and_each_row_leaves_itself_out(config, tmp_path):
    features = ("verifier_max", "memory_1", "memory_2")
    head = fit(replace(config, features=features, epochs=1, figure_every=0), tmp_path).head
    train = open_traces(config.train)
    gold, before = train.column("gold"), train.summary(["previous_token_1"])["previous_token_1"].numpy()
    n = head.columns(train.summary(head.features))[:, 1].expm1()  # log(1 + n) of memory_1, this row counted
    wanted = [(before == token).sum() for token in before[:60]]
    np.testing.assert_allclose(n[:60], wanted, rtol=1e-5)
    left_out = head.columns(train.summary(head.features), torch.from_numpy(gold.copy()).long())[:, 1].expm1()
    np.testing.assert_allclose(left_out[:60], np.array(wanted) - 1, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head.mean[1].expm1() - 0, np.expm1(left_out.log1p().mean()), rtol=1e-4)
