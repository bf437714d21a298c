"""score_rules against plain float64 arithmetic on the distributions themselves, statistic by statistic."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral_train import make_rule
from deferral_train.errors import InputError
from deferral_train.evaluation import score_rules
from deferral_train.evaluation.figures import draw_scores
from deferral_train.rules import TokenRule
from deferral_train.traces import Traces, open_traces
from evaluation.language import VOCABULARY, Language

ALPHAS = [-0.5, 0.0, 0.1, 0.6]


def reference(language: Language, name: str, alpha: float, temperature: float) -> dict[str, float]:
    """Rates and risks of one setting, from whole distributions in float64."""
    rule = make_rule(name, alpha=alpha)
    drafter, verifier = language.drafter_logits.double(), language.verifier_logits.double()
    pi = rule.target(drafter, verifier, temperature)
    q, p = (make_rule(end).target(drafter, verifier, temperature) for end in ("drafter_only", "lossless"))
    rejected = (q - pi).clamp(min=0).sum(1)
    at_gold = pi.gather(1, language.gold[:, None]).squeeze(1)
    return {
        "rejection_rate": float(rejected.mean()),
        "emitted_risk": float(1 - at_gold.mean()),
        "calls_per_token": _calls(language, 1 - rejected.numpy()) / len(rejected),
        "tv": float((q - p).clamp(min=0).sum(1).mean()),
    }


def _calls(language: Language, accept: np.ndarray, block: int = 5) -> float:
    """Expected calls by enumerating blocks backwards, prompt by prompt."""
    total = 0.0
    for prompt in range(int(language.prompt.max()) + 1):
        own = accept[(language.prompt == prompt).numpy()]
        calls = np.zeros(len(own) + block + 2)
        for start in range(len(own) - 1, -1, -1):
            alive, calls[start] = 1.0, 1.0
            for k in range(block):
                here = own[start + k] if start + k < len(own) else 0.0
                calls[start] += alive * (1 - here) * calls[min(start + k + 1, len(own))]
                alive *= here
            calls[start] += alive * calls[min(start + block + 1, len(own))]
        total += calls[0]
    return total


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["opt", "diff", "opt_verifier", "token_v1", "token_v2"])
def test_rates_and_emitted_risk_equal_those_of_the_distributions(
    language: Language, traces: Traces, greedy_traces: Traces, name: str, temperature: float
) -> None:
    source = traces if temperature else greedy_traces
    scores = score_rules(source, [name], grid={name: ALPHAS}, bootstrap=0)[name]
    for setting, alpha in enumerate(scores.values):
        expected = reference(language, name, alpha, temperature)
        for metric in ("rejection_rate", "emitted_risk", "calls_per_token"):
            # Candidates are stored in half precision, so token rules differ by its rounding.
            tolerance = 2e-3 if issubclass(type(make_rule(name)), TokenRule) else 2e-5
            assert scores.metrics[metric][setting] == pytest.approx(expected[metric], abs=tolerance), metric


@pytest.mark.parametrize("loss", ["zero_one", "log", "prob"])
@pytest.mark.parametrize("truth", ["reference", "verifier", "exact"])
def test_risk_is_the_mean_loss_of_the_model_in_charge(
    language: Language, traces: Traces, loss: str, truth: str
) -> None:
    table = score_rules(traces, ["opt"], grid={"opt": ALPHAS}, bootstrap=0, loss=loss, truth=truth)
    gold = torch.nn.functional.one_hot(language.gold, language.P.shape[1]).float()
    distribution = {"reference": gold, "verifier": language.p, "exact": language.P}[truth]

    def losses(model: torch.Tensor) -> torch.Tensor:
        if loss == "zero_one":
            return 1 - distribution.gather(1, model.argmax(1, keepdim=True)).squeeze(1)
        return -(distribution * model.log()).sum(1) if loss == "log" else 1 - (distribution * model).sum(1)

    tv = (language.q - language.p).clamp(min=0).sum(1)
    for setting, alpha in enumerate(table["opt"].values):
        defer = language.p.amax(1) - language.q.amax(1) > alpha * tv
        expected = torch.where(defer, losses(language.p), losses(language.q)).mean()
        assert table["opt"].metrics["risk"][setting] == pytest.approx(float(expected), abs=1e-4)
        assert table["opt"].metrics["deferral_rate"][setting] == pytest.approx(float(defer.float().mean()))


def test_regret_is_priced_risk_minus_the_oracle_and_never_negative(traces: Traces) -> None:
    table = score_rules(traces, ["opt"], grid={"opt": ALPHAS}, bootstrap=0, truth="exact")
    metrics = table["opt"].metrics
    priced = metrics["risk"] + np.array(table["opt"].values) * metrics["rejection_rate"]
    np.testing.assert_allclose(metrics["regret"], priced - metrics["oracle_priced_risk"], atol=1e-5)
    assert (metrics["regret"] > 0).all()
    assert np.abs(table["oracle"].metrics["regret"]).max() < 1e-7
    # With one gold token the same quantity is no regret and does not carry the name.
    hindsight = score_rules(traces, ["opt"], grid=5, bootstrap=0)["opt"].metrics
    assert "hindsight_excess" in hindsight
    assert "regret" not in hindsight


def test_no_rule_beats_the_oracle_at_its_price(traces: Traces) -> None:
    """Lemma 4: under the exact truth the oracle's priced risk is the least at every alpha."""
    table = score_rules(traces, ["opt", "chow", "diff"], bootstrap=0, truth="exact", grid=11)
    oracle = table["oracle"]
    for place, alpha in enumerate(oracle.values):
        for name in ("opt", "chow", "diff"):
            metrics = table[name].metrics
            priced = metrics["risk"] + alpha * metrics["rejection_rate"]
            assert priced.min() >= oracle.metrics["oracle_priced_risk"][place] - 1e-5


def test_agreement_with_opt_is_one_for_the_same_rule_under_another_name(traces: Traces) -> None:
    table = score_rules(traces, {"twin": "opt", "opt": "opt", "chow": "chow"}, bootstrap=0)
    np.testing.assert_array_equal(table["twin"].agreement["agreement_opt"], 1.0)
    assert (table["chow"].agreement["agreement_opt"] < 1).any()


class Stub:
    """A head that knows the exact gap up to noise: any object with the right names is scored."""

    stage = "verify"
    loss = "zero_one"
    features = ("verifier_max", "drafter_max", "verifier_at_drafter_argmax")

    def gap(self, summary):  # type: ignore[no-untyped-def]
        return summary["verifier_max"] - summary["verifier_at_drafter_argmax"]


def test_a_head_is_scored_like_the_rule_it_imitates(traces: Traces) -> None:
    rules = {"head": make_rule("learned", head=Stub(), alpha=0.3), "opt_verifier": "opt_verifier"}
    table = score_rules(traces, rules, grid=[0.0, 0.5], bootstrap=0)
    assert table["head"].values == (0.0, 0.3, 0.5)
    assert table["head"].chosen == 0.3
    for metric in ("risk", "rejection_rate", "calls_per_token"):
        ours, theirs = table["head"].metrics[metric], table["opt_verifier"].metrics[metric]
        np.testing.assert_allclose(ours[[0, 2]], [theirs[0], theirs[-1]])
    assert table.calibration["head"]["calibration_error"] < table.calibration["opt"]["calibration_error"]


def test_several_folders_of_one_pair_are_one_table(
    language: Language, traces: Traces, tmp_path: Path
) -> None:
    ids = traces.prompt_ids
    parts = [traces.select_prompts(ids[40:]), traces.select_prompts(ids[:40])]
    whole, joined = (
        score_rules(source, ["opt", "token_v3"], bootstrap=50, grid=3) for source in (traces, parts)
    )
    for name in ("opt", "token_v3"):
        for metric, values in whole[name].metrics.items():
            np.testing.assert_allclose(joined[name].metrics[metric], values, rtol=1e-5)


def test_same_numbers_whatever_the_blocks_and_threads(
    traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score_rules(traces, ["opt", "chow"], bootstrap=20, grid=7).as_dict()
    monkeypatch.setattr("deferral_train.evaluation.positions.Positions.spans.__defaults__", (100,))
    cut = score_rules(traces, ["opt", "chow"], bootstrap=20, grid=7, workers=3).as_dict()
    assert _numbers(cut["points"]) == pytest.approx(_numbers(whole["points"]), rel=1e-5, abs=1e-7)


def _numbers(points: list[dict]) -> list[float]:
    return [v["value"] for point in points for v in point.values() if isinstance(v, dict)]


def test_intervals_cover_the_population_value(tmp_path: Path) -> None:
    """Twenty draws of 60 prompts: the 90% interval of OPT's rejection rate misses the large-sample value
    rarely.
    """
    options = {"bootstrap": 300, "confidence": 0.9, "grid": {"opt": [0.1]}}
    truth = score_rules(Language(2000, seed=99).write(tmp_path / "all"), ["opt"], **options)["opt"]
    missed = 0
    for seed in range(20):
        table = score_rules(Language(60, seed=seed).write(tmp_path / str(seed)), ["opt"], **options)
        interval = table.interval("opt", "rejection_rate", 0)
        missed += not interval.low <= truth.metrics["rejection_rate"][0] <= interval.high
    assert missed <= 6  # binomial(20, 0.1) exceeds 6 with probability 0.2%


def test_files_hold_the_table(traces: Traces, tmp_path: Path) -> None:
    table = score_rules(
        traces, ["opt"], grid=3, bootstrap=50, costs={"drafter": 0.1, "verifier": 1.0}, prefixes=2
    )
    points = json.loads(table.to_json(tmp_path / "scores.json").read_text())["points"]
    rows = list(csv.DictReader(table.to_csv(tmp_path / "scores.csv").open()))
    assert len(rows) == len(points)
    opt = next(row for row in rows if row["rule"] == "opt")
    assert float(opt["risk_low"]) <= float(opt["risk"]) <= float(opt["risk_high"])
    files = draw_scores(table, tmp_path / "figures")
    assert {path.suffix for path in files} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in files)
    assert [len(prompt["tokens"]) for prompt in table.prefixes["prompts"]] == [
        len(prompt["gap"]["opt (plug-in)"]) for prompt in table.prefixes["prompts"]
    ]
    assert "opt" in table.text()


def test_bad_input_is_one_clear_line(language: Language, traces: Traces, tmp_path: Path) -> None:
    few = traces.select_prompts(traces.prompt_ids[:4])
    other = Language(12, seed=5).write(tmp_path / "other", temperature=0.0)
    bare = Language(12, seed=5).write(tmp_path / "bare", top_k=0)
    stranger = Language(12, seed=6).write(tmp_path / "stranger", 1.0, VOCABULARY)
    manifest = json.loads((tmp_path / "stranger" / "manifest.json").read_text())
    manifest["pair"] = {"drafter": {"name": "another"}}
    (tmp_path / "stranger" / "manifest.json").write_text(json.dumps(manifest))
    stranger = open_traces(tmp_path / "stranger")
    cases = [
        ("traces differ in pair.drafter", lambda: score_rules([traces, stranger], ["opt"], bootstrap=0)),
        ("bootstrap needs at least 10 prompts", lambda: score_rules(few, ["opt"])),
        ("traces differ in temperature", lambda: score_rules([traces, other], ["opt"], bootstrap=0)),
        ("is in two of the traces", lambda: score_rules([traces, traces], ["opt"], bootstrap=0)),
        ("rules is empty", lambda: score_rules(traces, [])),
        ("unknown rule 'optt'", lambda: score_rules(traces, ["optt"])),
        ("rules named twice: opt", lambda: score_rules(traces, ["opt", "opt:alpha=0.2"])),
        ("loss is 'mse'", lambda: score_rules(traces, ["opt"], loss="mse")),
        ("grid is 0", lambda: score_rules(traces, ["opt"], grid=0)),
        ("bootstrap is -3", lambda: score_rules(traces, ["opt"], bootstrap=-3)),
        ("num_draft_tokens is -2", lambda: score_rules(traces, ["opt"], num_draft_tokens=-2)),
        ("confidence is 7", lambda: score_rules(traces, ["opt"], confidence=7)),
        ("costs has unknown", lambda: score_rules(traces, ["opt"], costs={"drafter": 1.0, "big": 2.0})),
        ("token_v3", lambda: score_rules(bare, ["token_v3"], bootstrap=0)),
        ("no scores of 'chow'", lambda: score_rules(traces, ["opt"], bootstrap=0, grid=2)["chow"]),
    ]
    for message, call in cases:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
