"""A judge head from labelled traces to a threshold; an acceptance head from traces to a stop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score
from tiny_models import tiny_pair

from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.drafting.stop_fit import fit_acceptance
from deferral_train.errors import InputError
from deferral_train.evaluation.judging import choose_threshold, sweep
from deferral_train.heads import DeferralHead, GapHead, JudgeHead
from deferral_train.heads.objectives import OBJECTIVES, REJECTED_WEIGHT, objective_for
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces import Traces, open_traces
from deferral_train.traces.judged import acceptable, check_labels, judged_rows, resolve_truth
from deferral_train.traces.sequence import argmax_summary
from deferral_train.traces.truth import rejection
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit

CONFIG = CollectConfig(
    prefixes="verifier", temperature=0.0, labels="selfjudge", label_window=5, max_new_tokens=12, log_top_k=0,
    hidden="drafter", chunk_prompts=100, device="cpu",
)  # fmt: skip
FIT = {"head": "judge", "body": "linear", "batch_size": 64, "epochs": 20, "lr": 0.02, "figure_every": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Labelled traces of verifier's text, and plain ones of the drafter's own at temperature 1."""
    root = tmp_path_factory.mktemp("judging")
    pair = make_pair(*tiny_pair("llama", 2))
    generator = torch.Generator().manual_seed(0)
    for name, count, changes in (
        ("fit", 60, {}),
        ("val", 30, {}),
        ("drafts", 40, {"prefixes": "drafter", "temperature": 1.0, "labels": None}),
    ):
        ids = torch.randint(36, (count, 5), generator=generator).tolist()
        prompts = [Prompt(f"{name}{n}", " ".join(f"w{w}" for w in row)) for n, row in enumerate(ids)]
        config = dataclasses.replace(CONFIG, **changes)
        collect(config, root / name, progress=False, models=pair, prompts=prompts)
    return {name: str(root / name) for name in ("fit", "val", "drafts")}


@pytest.fixture(scope="module")
def judged(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[JudgeHead, str]:
    config = FitConfig(
        train=folders["fit"], val=folders["val"], truth="judge:rate=0.4", weight_decay=0.0, **FIT
    )
    head = fit(config, tmp_path_factory.mktemp("fitted")).head
    assert isinstance(head, JudgeHead)
    return head, head.metadata["training"]["truth"]


def test_fit_is_logistic_regression_on_the_judged_tokens(
    folders: dict[str, str], judged: tuple[JudgeHead, str]
) -> None:
    head, truth = judged
    traces = open_traces(folders["fit"])
    assert truth == resolve_truth("judge:rate=0.4", traces)
    rows = judged_rows(traces)
    states = traces.summary(["verifier_hidden_at_token"]).verifier_hidden_at_token[rows]
    good = acceptable(traces, truth)[rows]
    assert abs(float(good.double().mean()) - 0.4) < 0.02
    known = LogisticRegression(C=1e4, max_iter=2000).fit(states.numpy(), good.numpy())
    best = torch.from_numpy(known.predict_log_proba(states.numpy()))
    scores = head.score(argmax_summary(traces, head.features).select(rows)).double()
    ours = torch.where(good, scores.log(), (1 - scores).log()).mean()
    assert float(best[torch.arange(len(good)), good.long()].mean() - ours) < 0.15  # nats short of the optimum
    base = float(good.double().mean())
    assert float(ours) > base * torch.tensor(base).log() + (1 - base) * torch.tensor(1 - base).log() + 0.05


def test_thresholds_are_the_best_of_all(folders: dict[str, str], judged: tuple[JudgeHead, str]) -> None:
    head, truth = judged
    traces = open_traces(folders["val"])
    rows = judged_rows(traces)
    good = acceptable(traces, truth)[rows].numpy()
    scores = head.score(argmax_summary(traces, head.features).select(rows)).numpy()
    tried = [*sorted(set(scores.tolist())), 0.0, 1.0]
    best = {
        "f1": max(f1_score(good, scores > t, zero_division=0) for t in tried),
        "recall": max(recall_score(good, scores > t, average="macro") for t in tried),
    }
    found = {by: choose_threshold(head, traces, truth, by) for by in best}
    for point in (*found.values(), *sweep(head, traces, truth)):
        passes = scores > point.threshold
        assert point.f1 == pytest.approx(f1_score(good, passes, zero_division=0))
        assert (point.recall + point.specificity) / 2 == pytest.approx(
            recall_score(good, passes, average="macro")
        )
    assert found["f1"].f1 == pytest.approx(best["f1"])
    assert (found["recall"].recall + found["recall"].specificity) / 2 == pytest.approx(best["recall"])


def test_an_acceptance_head_learns_the_weighted_label(folders: dict[str, str], tmp_path: Path) -> None:
    traces = open_traces(folders["drafts"])
    logs = traces.summary(["drafter_logprob", "verifier_logprob"])
    label = (logs.verifier_logprob - logs.drafter_logprob).exp().clamp(max=1)
    assert torch.allclose(1 - rejection(traces), label, atol=1e-6)
    greedy = traces.summary(["drafter_argmax", "verifier_argmax"])
    assert torch.equal(rejection(traces, 0.0), (greedy.drafter_argmax != greedy.verifier_argmax).float())
    config = FitConfig(
        train=traces, stage="draft", truth="acceptance", features=["drafter_logprob", "drafter_hidden"], **FIT
    )
    head = fit(config, tmp_path / "fit").head
    batch = {"x": head.columns(traces.summary(head.features)), "z": rejection(traces)}
    own = OBJECTIVES["judge"](head, batch, torch.Generator())
    predicted = head.score(traces.summary(head.features))
    each = -(label * predicted.log() + REJECTED_WEIGHT * (1 - label) * (1 - predicted).log())
    torch.testing.assert_close(own, each.mean(), rtol=1e-4, atol=1e-4)
    # The best constant is a / (a + 6 (1 - a)): the head must beat what it scores.
    a = float(label.mean())
    constant = torch.tensor(a / (a + REJECTED_WEIGHT * (1 - a)))
    flat = -(a * constant.log() + REJECTED_WEIGHT * (1 - a) * (1 - constant).log())
    assert float(own) < float(flat) - 0.02
    head.save_pretrained(tmp_path / "head")
    again = DeferralHead.from_pretrained(tmp_path / "head")
    found = fit_acceptance(again, traces, cost=0.2, longest=4)
    assert 0 <= found.threshold <= 1
    assert found.speed >= found.constant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": "reference"}, "a judge head of stage 'verify' learns from truth judge"),
        ({"truth": "acceptance"}, "a judge head of stage 'verify' learns from truth judge"),
        ({"truth": "judge"}, "selfjudge scores need a finite threshold"),
        ({"truth": "judge:tau=-1e9"}, "labels are of one class"),
        ({"truth": "judge:tau=-2", "head": "gap"}, "labels a judge head, not a gap head"),
        (
            {"truth": "judge:tau=-2", "stage": "draft", "features": ("drafter_max",)},
            "learns from truth acceptance",
        ),
        ({"truth": "judge:tau=-2", "objective": "squared"}, "objective 'squared' does not fit a judge head"),
        (
            {"truth": "acceptance", "stage": "draft", "features": ("drafter_logprob",)},
            "speak of a token that the drafter did not write",
        ),
    ],
)
def test_fits_that_cannot_be_meant(
    folders: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"train": folders["fit"], "val": folders["val"], **FIT} | changes
    with pytest.raises(InputError) as caught:
        fit(FitConfig(**settings), tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_of_another_kind_are_not_parted_by_the_same_tau() -> None:
    first = {"kind": "selfjudge", "window": 20, "hidden": 32}
    check_labels([first, dict(first)])
    with pytest.raises(InputError, match="labels: kind is autojudge in one trace folder and selfjudge"):
        check_labels([first, {"kind": "autojudge", "hidden": 32}])
    with pytest.raises(InputError, match="labels: window is 5 in one trace folder and 20"):
        check_labels([first, {**first, "window": 5}])


def test_what_cannot_judge_is_refused(folders: dict[str, str], judged: tuple[JudgeHead, str]) -> None:
    head, truth = judged
    traces: Traces = open_traces(folders["val"])
    with pytest.raises(InputError, match="by='best': use one of recall, f1"):
        choose_threshold(head, traces, truth, "best")
    with pytest.raises(InputError, match="judges no tokens"):
        choose_threshold(JudgeHead(["drafter_max"], stage="draft"), traces, truth)
    with pytest.raises(InputError, match="predicts no acceptance"):
        fit_acceptance(head, traces, cost=0.2)
    with pytest.raises(InputError, match="does not fit"):
        objective_for(GapHead(["drafter_max"]), "judge")
