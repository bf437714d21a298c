"""Rounds on finished texts with tiny pairs: fits on labels, choosing by decoding, resuming, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding.helpers import pair_of

from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding import Pair
from deferral_train.errors import InputError
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.evaluation.sequence_scores import score_sequences
from deferral_train.evaluation.token_pairs import token_pairs
from deferral_train.heads import DeferralHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.pipeline.learning import DecodedPoint, Learning, RoundsSettings, at_calls, next_price
from deferral_train.report.page import write_report
from deferral_train.traces import open_traces
from deferral_train.traces.sequence import (
    check_one_kind,
    labelled_rows,
    sequence_gap,
    sequence_summary,
)
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import FitResult, fit

SETTINGS = RoundsSettings(
    rounds=1,
    metrics=("chrf1", "sentence_bleu"),
    own_share=0.6,
    max_new_tokens=10,
    num_draft_tokens=3,
    calls=0.6,
)


def prompts(start: int, count: int) -> list[Prompt]:
    numbers = [np.random.default_rng(i).integers(0, 30, 3 + i % 5) for i in range(start, start + count)]
    text = [" ".join(f"w{number}" for number in row) for row in numbers]
    return [Prompt(f"p{start + i}", line, f"{line} w1 w2 w3 w4") for i, line in enumerate(text)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(make_pair(*pair_of("t5")))


def labelled(pair: Pair, out: Path, given: list[Prompt], **changes: object) -> Path:
    config = CollectConfig(
        prefixes="verifier", temperature=0.0, labels="sequence", label_metric="chrf1", hidden="verifier",
        log_top_k=0, max_new_tokens=10,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    scores = make_scorers(config.metrics)
    collect(config, out, progress=False, models=pair.models, prompts=given, scores=scores)
    return out


@pytest.fixture(scope="module")
def folder(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(pair, tmp_path_factory.mktemp("labels") / "traces", prompts(0, 40))


def fitted(pair: Pair, folder: Path, out: Path, **changes: object) -> FitResult:
    matrix = pair.models.verifier.get_output_embeddings().weight.detach()
    config = FitConfig(
        train=folder, truth="sequence", body="linear", objective="ridge", verifier=matrix, val_fraction=0.25
    )
    return fit(dataclasses.replace(config, **changes), out)  # type: ignore[arg-type]


def test_ridge_is_the_least_squares_solution_with_its_penalty(
    pair: Pair, folder: Path, tmp_path: Path
) -> None:
    from sklearn.linear_model import Ridge

    from deferral_train.heads import GapHead
    from deferral_train.training.ridge import PENALTIES, fit_ridge

    head = GapHead(["tv", "drafter_margin", "verifier_max:logit"], loss="sequence", body="linear")
    traces = open_traces(folder)
    rows = labelled_rows(traces)
    x = head.columns(traces.summary(head.features).select(rows))
    z = sequence_gap(traces)[rows]
    half = len(z) // 2
    train, val = ({"x": x[part], "z": z[part]} for part in (slice(half), slice(half, None)))
    head.fit_normalisation([train["x"]])
    penalty = fit_ridge(head, train, val)
    errors = {}
    for candidate in PENALTIES:
        model = Ridge(alpha=candidate * half).fit(head.prepare(train["x"]).double(), train["z"].double())
        errors[candidate] = float(
            np.square(model.predict(head.prepare(val["x"]).double()) - val["z"].numpy()).sum()
        )
        if candidate == penalty:
            own = head.body[0].weight[0].detach().numpy()
            assert own == pytest.approx(model.coef_, abs=1e-6)
            assert head.body[0].bias.item() == pytest.approx(float(model.intercept_), abs=1e-6)
    assert errors[penalty] == min(errors.values())


def test_a_fit_on_labels_logs_exact_regret_and_gives_a_folded_head(
    pair: Pair, folder: Path, tmp_path: Path
) -> None:
    result = fitted(pair, folder, tmp_path / "fit")
    assert result.metrics["regret"] == result.metrics["exact_regret"] >= 0
    assert {"exact_regret_opt", "exact_regret_plug_in", "excess_over_opt"} <= set(result.metrics)
    assert result.head.loss == "sequence"
    assert "drafter_argmax_worth" in result.head.config["features"]
    assert "matrix" in result.head.config["widths"]  # the cosine reads it
    training = result.head.metadata["training"]
    assert training["labels"]["metrics"] == ["chrf1"]
    result.head.save_pretrained(tmp_path / "head")
    head = DeferralHead.from_pretrained(tmp_path / "head")
    texts = [prompt.prompt for prompt in prompts(50, 6)]
    calls = [
        float(
            pair.generate(texts, rule=learned_rule(head, alpha), max_new_tokens=10).stats.verifier_calls.sum()
        )
        for alpha in (-5.0, 5.0)
    ]
    assert calls[0] > calls[1]
    plain = fitted(pair, folder, tmp_path / "huber", objective="huber", epochs=2, verifier=None)
    assert "drafter_argmax_worth" not in plain.head.config["features"]


def test_a_price_on_length_moves_the_labels(folder: Path) -> None:
    from deferral_train.traces.truth import gap

    traces = open_traces(folder)
    rows = labelled_rows(traces)
    plain, priced = (gap(traces, truth)[rows] for truth in ("sequence", "sequence:length=0.5"))
    words = torch.from_numpy(traces.column("sequence_words").copy())[rows]
    assert torch.allclose(priced - plain, 0.5 * words / words.std(correction=0), atol=1e-5)
    with pytest.raises(InputError, match=r"sequence:length=0\.1"):
        gap(traces, "sequence:width=0.5")


def test_labels_that_do_not_mean_the_same_are_not_fitted_together(
    pair: Pair, folder: Path, tmp_path: Path
) -> None:
    other = labelled(pair, tmp_path / "other", prompts(60, 12), label_metric="sentence_bleu")
    with pytest.raises(InputError, match=r"sequence labels: metrics is \['sentence_bleu'\]"):
        fitted(pair, folder, tmp_path / "fit", train=[folder, other])
    few = labelled(pair, tmp_path / "few", prompts(60, 2))
    with pytest.raises(InputError, match="labelled places, at least 20"):
        fitted(pair, few, tmp_path / "fit", val_fraction=0.5)
    plain = CollectConfig(prefixes="verifier", temperature=0.0, log_top_k=0, max_new_tokens=10)
    collect(plain, tmp_path / "bare", progress=False, models=pair.models, prompts=prompts(0, 12))
    with pytest.raises(InputError, match="these traces hold no labels"):
        fitted(pair, tmp_path / "bare", tmp_path / "fit")


@pytest.mark.parametrize("bend", [0.0, 0.15, -0.4, -0.8])
@pytest.mark.parametrize("start", [-0.1, 0.08])
def test_the_price_on_length_is_sought_until_the_text_is_as_long_as_lossless(
    start: float, bend: float
) -> None:
    """Length as a bent function of the price, as it was on a pair where one step of the secant overshot."""
    excess: dict[float, float] = {}
    price: float | None = 0.0
    while price is not None:
        excess[price] = start - 0.3 * price - (bend if price < 0 else -bend) * price * price
        price = next_price(excess, 0.005)
    assert list(excess)[:2] == [0.0, -0.15 if start < 0 else 0.15]
    assert 3 <= len(excess) <= 5
    assert min(map(abs, excess.values())) <= 0.005


def test_the_search_for_a_price_ends() -> None:
    assert next_price({0.0: 0.004}, 0.005) is None
    assert next_price({0.0: -0.1, -0.15: -0.1}, 0.005) is None  # the price does nothing
    assert next_price({0.0: -0.1, -0.15: -0.099}, 0.005) == -1.0  # the most
    assert next_price({0.0: -0.1, -0.15: -0.099, -1.0: -0.09}, 0.005) is None
    assert next_price({0.0: -0.099, -0.15: -0.057, -0.354: 0.03}, 0.005) == -0.284


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("pair", {"verifier": {"weights": "another"}}, "verifier is another"),
        ("temperature", 1.0, "temperature is 1.0"),
        ("labels", {"scales": [0.5]}, r"scales is \[0.5\]"),
        ("labels", {"reference": "verifier"}, "reference is verifier"),
        ("labels", {"form": "token"}, "form is token"),
    ],
)
def test_labels_of_another_kind_are_named(folder: Path, where: str, value: object, message: str) -> None:
    first, other = open_traces(folder), open_traces(folder)
    check_one_kind([first, other])
    old = getattr(other.manifest, where)
    new = {**old, **value} if isinstance(value, dict) else value
    object.__setattr__(other, "manifest", dataclasses.replace(other.manifest, **{where: new}))
    with pytest.raises(
        InputError, match=f"sequence labels: {message} in one trace folder and .* in the first"
    ):
        check_one_kind([first, other])


def test_a_judge_learns_from_the_same_labels(pair: Pair, folder: Path, tmp_path: Path) -> None:
    result = fitted(
        pair, folder, tmp_path / "judge", head="judge", truth="judge:sequence=0.01", body="mlp", objective="auto",
        epochs=2,
    )  # fmt: skip
    assert result.head.head_type == "judge"
    assert 0 < result.metrics["judge_loss"] < 3


def test_rules_and_heads_are_scored_by_the_same_labels(pair: Pair, folder: Path, tmp_path: Path) -> None:
    result = fitted(pair, folder, tmp_path / "fit")
    traces = open_traces(folder)
    scores = score_sequences(
        [traces], ["opt", "opt_verifier", "token_v2", "lossy", learned_rule(result.head, 0.0)], bootstrap=50
    )
    assert set(scores.rules) == {"opt", "opt_verifier", "token_v2", "learned"}
    assert set(scores.left_out) == {"lossy"}
    gap = sequence_gap(traces)[labelled_rows(traces)]
    for name, found in scores.rules.items():
        assert all(0 <= one.kept <= 1 for one in found), name
        everything = [one for one in found if one.kept == 1]
        for one in everything:
            assert one.kept_gap[0] == pytest.approx(float(gap.mean()), abs=1e-6)
            assert one.loss[0] == pytest.approx(float(gap.sum()) / 40, abs=1e-6)
    # A head that was fitted on these places knows them better than a rule does.
    assert scores.at_kept("learned", 0.5) < scores.at_kept("opt", 0.5)
    written = json.loads(scores.write(tmp_path).read_text())
    assert written["meta"]["unit"] == "chrf1"


def test_form_b_from_labels_to_decoded_text(pair: Pair, tmp_path: Path) -> None:
    """Labels of drafted tokens, their log q and log p, a folded head, offline scores and the loop."""
    given = prompts(0, 30)
    labels = labelled(
        pair,
        tmp_path / "traces",
        given,
        temperature=1.0,
        label_form="token",
        label_samples=2,
        max_new_tokens=6,
    )
    traces = open_traces(labels)
    rows = labelled_rows(traces)
    at = sequence_summary(
        traces, ["token", "drafter_logprob", "verifier_logprob", "drafter_max", "drafter_argmax"]
    )
    at = at.select(rows)
    top = at.token == at.drafter_argmax
    assert 0 < int(top.sum()) < len(top)
    assert torch.allclose(at.drafter_logprob[top], at.drafter_max[top].log(), atol=1e-4)
    assert (at.drafter_logprob[~top] < at.drafter_max[~top].log() + 1e-5).all()
    result = fitted(pair, labels, tmp_path / "fit", head="token_gap", objective="squared", epochs=2)
    head = result.head
    assert head.head_type == "token_gap"
    assert head.inputs.lookups is not None
    assert not head.inputs.lookups.width
    assert dict(head.named_parameters())["body.0.weight"].abs().sum() > 0
    head.save_pretrained(tmp_path / "head")
    scores = score_sequences([traces], ["opt", f"learned:head={tmp_path / 'head'},alpha=0.1"], bootstrap=0)
    own = next(found for name, found in scores.rules.items() if name.startswith("learned"))
    assert own[0].kept < 0.3 < 0.7 < own[-1].kept
    gap = sequence_gap(traces)[rows].numpy()
    every = float(gap.mean()), float(gap.std())
    assert own[-1].kept_gap[0] == pytest.approx(every[0], abs=every[1])
    rule = learned_rule(head, 0.05)
    found = pair.generate([one.prompt for one in given[:4]], rule, temperature=1.0, max_new_tokens=6, seed=1)
    assert all(found.texts)
    with pytest.raises(InputError, match=r"labels of form 'position'|--label-form token"):
        fitted(
            pair,
            folder_of_positions(pair, tmp_path),
            tmp_path / "other",
            head="token_gap",
            objective="squared",
        )


def folder_of_positions(pair: Pair, out: Path) -> Path:
    return labelled(pair, out / "positions", prompts(0, 12), temperature=1.0, max_new_tokens=6)


def test_token_pairs_are_ordered_by_what_the_head_estimates(pair: Pair, folder: Path, tmp_path: Path) -> None:
    head = fitted(pair, folder, tmp_path / "fit").head
    traces = open_traces(folder)
    found = token_pairs([traces], head, pair.tokenizer, fewest=2, shown=3)
    rows = labelled_rows(traces)
    summary = traces.summary([*head.features, "drafter_argmax", "verifier_argmax"]).select(rows)
    for one in (*found.harmless, *found.harmful):
        ids = pair.tokenizer.convert_tokens_to_ids([one.drafter, one.verifier])
        own = (summary.drafter_argmax == ids[0]) & (summary.verifier_argmax == ids[1])
        assert int(own.sum()) == one.count >= 2
        assert one.estimate == pytest.approx(float(head.gap(summary)[own].mean()), abs=1e-5)
        assert one.label == pytest.approx(float(sequence_gap(traces)[rows][own].mean()), abs=1e-5)
    assert found.harmless[0].estimate <= found.harmless[-1].estimate <= found.harmful[0].estimate


def test_rounds_choose_by_decoding_and_resume(pair: Pair, tmp_path: Path) -> None:
    scorers = make_scorers(SETTINGS.metrics)
    learning = Learning(pair, prompts(0, 40), prompts(100, 15), scorers, SETTINGS, tmp_path)
    content = learning.run()
    assert [record["round"] for record in content["rounds"]] == [0, 1]
    assert content["rounds"][0]["prefixes"] == "verifier"
    assert content["rounds"][1]["prefixes"].startswith("cascade:learned:head=")
    first, second = (open_traces(tmp_path / "traces" / f"round-{n}") for n in (0, 1))
    assert first.manifest.labels["scales"] == second.manifest.labels["scales"]
    assert second.manifest.labels["share"] == 0.6
    best = min(
        one["at_calls"]["loss"]
        for record in content["rounds"]
        for one in record["candidates"]
        if one["head"] == record["best"]
    )
    assert content["chosen"]["at_calls"]["loss"] == best
    for found in content["rounds"][1]["predicted"].values():
        assert (
            found["difference"]["low"] <= found["predicted"] - found["counted"] <= found["difference"]["high"]
        )
    head = DeferralHead.from_pretrained(tmp_path / "head")
    assert head.metadata["alpha"] == pytest.approx(content["chosen"]["alpha"])
    written = json.loads((tmp_path / "rounds.json").read_text())
    assert written == json.loads(json.dumps(content))
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Rounds of learning from finished texts" in page
    assert f"{content['rounds'][1]['labelled']:,}" in page
    again = Learning(pair, prompts(0, 40), prompts(100, 15), scorers, SETTINGS, tmp_path).run()
    assert again == content


def test_rounds_of_form_b(pair: Pair, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, temperature=1.0, label_form="token", label_samples=2, objectives=("squared",), max_new_tokens=6,
        length_tolerance=0.9,
    )  # fmt: skip
    scorers = make_scorers(settings.metrics)
    content = Learning(pair, prompts(0, 30), prompts(100, 8), scorers, settings, tmp_path).run()
    assert [record["prefixes"].partition(":")[0] for record in content["rounds"]] == ["verifier", "cascade"]
    assert all("predicted" not in record for record in content["rounds"])
    labels = open_traces(tmp_path / "traces" / "round-1").manifest.labels
    assert (labels["form"], labels["samples"]) == ("token", 2)
    head = DeferralHead.from_pretrained(tmp_path / "head")
    assert head.head_type == "token_gap"
    assert learned_rule(head).priced  # type: ignore[attr-defined]
    calls = [point["calls"] for point in content["rounds"][0]["candidates"][0]["points"]]
    assert min(calls) < 0.95 * max(calls)


def test_rounds_without_references_score_against_the_verifiers_own_text(pair: Pair, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, rounds=0, metrics=("chrf1",), label_reference="verifier", length_tolerance=0.9
    )
    scorers = make_scorers(settings.metrics)
    bare = [dataclasses.replace(one, reference=None) for one in (*prompts(0, 30), *prompts(100, 6))]
    given = dataclasses.replace(settings, label_reference="given")
    with pytest.raises(InputError, match=r"chrf1 needs references, and 6 of 6 validation prompts .* p100\)"):
        Learning(pair, prompts(0, 30), bare[30:], scorers, given, tmp_path)
    content = Learning(pair, bare[:30], bare[30:], scorers, settings, tmp_path).run()
    assert content["lossless"]["scores"] == {"chrf1": 1.0}
    points = content["rounds"][0]["candidates"][0]["points"]
    assert all(0 <= point["scores"]["chrf1"] == pytest.approx(1 - point["loss"]) for point in points)
    assert min(point["scores"]["chrf1"] for point in points) < 1


def test_validation_prompts_are_not_fitted_on(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="10 validation prompts have the text of a prompt that is fitted on, first p10"
    ):
        Learning(pair, prompts(0, 20), prompts(10, 20), make_scorers(["chrf1"]), SETTINGS, tmp_path)
    # Ids made of a file's name and the row are equal in two files of one name, and are no sign.
    others = [dataclasses.replace(one, id=f"p{n}") for n, one in enumerate(prompts(100, 20))]
    Learning(pair, prompts(0, 20), others, make_scorers(["chrf1"]), SETTINGS, tmp_path)


def test_a_prompt_that_repeats_is_labelled_once(pair: Pair, tmp_path: Path) -> None:
    twice = [*prompts(0, 5), dataclasses.replace(prompts(2, 1)[0], id="again")]
    scorers = make_scorers(["chrf1"])
    assert [
        one.id for one in Learning(pair, twice, prompts(50, 5), scorers, SETTINGS, tmp_path).fit_prompts
    ] == [f"p{n}" for n in range(5)]
    with pytest.raises(InputError, match=r"1 validation prompts have the text .* first again"):
        Learning(pair, prompts(0, 5), twice[5:], scorers, SETTINGS, tmp_path)


def test_numbers_at_callsed_calls_are_linear_between_points() -> None:
    points = [DecodedPoint(0.3, 0.5, 2.0, 0.9, {"m": 0.4}), DecodedPoint(0.1, 0.7, 1.0, 1.0, {"m": 0.6})]
    at = at_calls(points, 0.6)
    assert (at.alpha, at.calls, at.loss, at.length) == pytest.approx((0.2, 0.6, 1.5, 0.95))
    assert at.scores == {"m": pytest.approx(0.5)}
    assert at_calls(points, 0.9).alpha == 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": -1},
        {"calls": 1.0},
        {"own_share": 0.0},
        {"objectives": ()},
        {"length_tolerance": 1.0},
        {"label_form": "token"},
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
