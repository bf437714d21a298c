"""Sequence labels against texts finished one by one without a cache, and against enumerated expectations."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deferral_train.collecting import CollectConfig, collect
from deferral_train.collecting.api import tell_plan
from deferral_train.collecting.sequence import draw_places
from deferral_train.errors import InputError
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import ModelPair
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces import Traces, open_traces
from deferral_train.traces.sequence import labelled_rows, sequence_gap

from .conftest import make_prompts, tiny_pair

PROMPTS = make_prompts(5, seed=4)
CONFIG = CollectConfig(
    prefixes="verifier", temperature=0.0, labels="sequence", label_metric="chrf1", max_new_tokens=8, log_top_k=0,
    chunk_prompts=3, batch_tokens=200, device="cpu",
)  # fmt: skip


def collected(
    pair: ModelPair, out: Path, prompts: Sequence[Prompt] = PROMPTS, engine: Any = None, **changes: Any
) -> Traces:
    config = dataclasses.replace(CONFIG, **changes)
    scores = make_scorers(config.metrics)
    collect(config, out, progress=False, models=pair, prompts=prompts, scores=scores, engine=engine)
    return open_traces(out)


@torch.no_grad()
def next_logits(model: Any, prompt: Sequence[int], text: Sequence[int]) -> torch.Tensor:
    """Logits of the token after the prompt and a text, from a pass over all of it."""
    if model.config.is_encoder_decoder:
        ids = torch.tensor([[model.config.decoder_start_token_id, *text]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0, -1, :40]
    return model(input_ids=torch.tensor([[*prompt, *text]])).logits[0, -1, :40]


def finish(pair: ModelPair, prompt: Sequence[int], text: Sequence[int], most: int) -> list[int]:
    """The verifier's greedy text behind a beginning."""
    tokens = list(text)
    while len(tokens) < most and not (tokens and tokens[-1] in pair.eos_ids):
        tokens.append(int(next_logits(pair.verifier, prompt, tokens).argmax()))
    return tokens


def text_of(pair: ModelPair, tokens: Sequence[int]) -> str:
    return pair.tokenizer.decode(list(tokens), skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["t5", "llama", "mistral"])
@pytest.mark.parametrize("rule", [None, "opt:alpha=0.1"])
def test_labels_equal_texts_finished_one_by_one(kind: str, rule: str | None, tmp_path: Path) -> None:
    pair = tiny_pair(kind)
    prefixes = "verifier" if rule is None else "cascade"
    metrics = ["chrf1", "sentence_bleu"]
    traces = collected(
        pair, tmp_path, prefixes=prefixes, rule=rule, label_metric=metrics, label_scales=(0.5, 0.25)
    )
    score = make_scorers(metrics)
    encoded = encode_prompts(pair.tokenizer, PROMPTS, is_encoder_decoder=pair.is_encoder_decoder).kept
    columns = {name: traces.column(name) for name in traces.columns}
    seen = 0
    for number, (prompt, one) in enumerate(zip(PROMPTS, encoded)):
        rows = np.flatnonzero(columns["prompt"] == number)
        text = columns["token"][rows].tolist()
        for place, row in enumerate(rows):
            favourites = [
                int(next_logits(model, one.input_ids, text[:place]).argmax())
                for model in (pair.drafter, pair.verifier)
            ]
            if favourites[0] == favourites[1]:
                assert np.isnan(columns["sequence_gap"][row])
                assert columns["sequence_token"][row] == -1
                continue
            seen += 1
            kept, deferred = (
                text_of(pair, finish(pair, one.input_ids, [*text[:place], token], CONFIG.max_new_tokens or 0))
                for token in favourites
            )
            gaps = [
                float(own([deferred], [prompt.reference])[0] - own([kept], [prompt.reference])[0])
                for own in score.values()
            ]
            assert columns["sequence_gaps"][row] == pytest.approx(gaps, abs=1e-6)
            assert columns["sequence_gap"][row] == pytest.approx(
                (gaps[0] / 0.5 + gaps[1] / 0.25) / 2, abs=1e-5
            )
            assert columns["sequence_error"][row] == 0
            assert columns["sequence_words"][row] == len(kept.split()) - len(deferred.split())
            assert columns["sequence_token"][row] == favourites[0]
    assert seen > 5
    assert int(labelled_rows(traces).sum()) == seen


class OneByOne:
    """An engine of requests in this process: every text finished alone, without a cache."""

    facts: Mapping[str, Any] = {"engine": "one by one"}

    def __init__(self, pair: ModelPair) -> None:
        self.pair, self.asked = pair, 0

    def write(
        self,
        beginnings: Sequence[Sequence[int]],
        most: Sequence[int],
        vocab_size: int,
        temperature: float = 0.0,
        numbers: Sequence[Sequence[float]] = (),
    ) -> list[list[int]]:
        self.asked += len(beginnings)
        assert temperature == 0
        assert vocab_size == self.pair.vocab_size
        return [finish(self.pair, beginning, [], count) for beginning, count in zip(beginnings, most)]


@pytest.mark.parametrize("rule", [None, "opt:alpha=0.1"])
def test_labels_by_requests_to_an_engine_are_the_same(rule: str | None, tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    engine = OneByOne(pair)
    changes = {
        "prefixes": "verifier" if rule is None else "cascade",
        "rule": rule,
        "label_reference": "verifier",
    }
    expected = collected(pair, tmp_path / "own", **changes)
    found = collected(pair, tmp_path / "engine", engine=engine, **changes)
    assert engine.asked > 20
    assert labelled_rows(expected).sum() > 10
    for name in expected.columns:
        np.testing.assert_allclose(found.column(name), expected.column(name), atol=1e-6, err_msg=name)
    with pytest.raises(InputError, match=r"settings\.engine"):
        collected(pair, tmp_path / "own", engine=engine, **changes)


def test_gaps_of_kept_places_add_up_to_what_the_whole_text_loses(tmp_path: Path) -> None:
    from deferral_train.evaluation.sequence import predicted_loss

    pair = tiny_pair("t5")
    traces = collected(pair, tmp_path, prefixes="cascade", rule="opt:alpha=0.2")
    score = make_scorers(["chrf1"])["chrf1"]
    encoded = encode_prompts(pair.tokenizer, PROMPTS, is_encoder_decoder=True).kept
    lost = []
    for number, (prompt, one) in enumerate(zip(PROMPTS, encoded)):
        rows = traces.column("prompt") == number
        own = text_of(pair, traces.column("token")[rows].tolist())
        best = text_of(pair, finish(pair, one.input_ids, [], 8))
        lost.append(float(np.diff(score([own, best], [prompt.reference] * 2))[0]))
    assert np.abs(lost).max() > 0
    assert predicted_loss(traces).loss[:, 0] == pytest.approx(lost, abs=1e-6)


def test_prompts_and_batches_without_a_place_to_label(tmp_path: Path) -> None:
    """A drafter that never differs, and a share so small that whole batches hold no label."""
    pair = tiny_pair("t5")
    same = dataclasses.replace(pair, drafter=pair.verifier)
    assert not labelled_rows(collected(same, tmp_path / "same")).any()
    with pytest.raises(InputError, match="0 labelled places in 5 prompts are too few to weigh 2 metrics"):
        collected(same, tmp_path / "two", label_metric=["chrf1", "sentence_bleu"])
    few = collected(pair, tmp_path / "few", label_share=0.1, batch_tokens=1)
    rows = labelled_rows(few).numpy()
    assert 0 < len(np.unique(few.prompt_of_row[rows])) < len(PROMPTS)


def test_the_verifiers_own_text_as_reference(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    bare = [dataclasses.replace(prompt, reference=None) for prompt in PROMPTS]
    with pytest.raises(InputError, match=r"chrf1 needs references, and 5 of 5 prompts.*--label-reference"):
        collected(pair, tmp_path / "none", bare)
    traces = collected(pair, tmp_path / "own", bare, label_reference="verifier")
    gaps = sequence_gap(traces)[labelled_rows(traces)]
    # Along the verifier's own text deferring gives that very text: the gap is 1 - chrF of the other, never below 0.
    assert (gaps >= 0).all()
    assert gaps.max() > 0.1


def test_a_share_of_places_is_drawn_without_bias_and_by_seed(tmp_path: Path) -> None:
    counts = np.zeros(7)
    sizes = set()
    for seed in range(4000):
        drawn = draw_places(range(7), 0.4, seed)
        sizes.add(len(drawn))
        counts[drawn] += 1
    assert sizes == {2, 3}
    assert counts / 4000 == pytest.approx(np.full(7, 0.4), abs=5 * np.sqrt(0.4 * 0.6 / 4000))
    pair = tiny_pair("t5")
    whole = collected(pair, tmp_path / "whole")
    parts = [
        collected(pair, tmp_path / name, label_share=0.5, seed=seed) for name, seed in (("a", 0), ("b", 1))
    ]
    gaps = [sequence_gap(each) for each in (whole, *parts)]
    told = [~torch.isnan(each) for each in gaps]
    assert 0 < told[1].sum() < told[0].sum()
    assert not torch.equal(told[1], told[2])
    assert torch.equal(gaps[1][told[1]], gaps[0][told[1]])


@torch.no_grad()
def expected(pair: ModelPair, prompt: Prompt, ids: Sequence[int], begun: list[int], most: int) -> float:
    """E Q of the texts that the verifier samples behind a beginning, every one of them."""
    score = make_scorers(["chrf1"])["chrf1"]
    if len(begun) == most or (begun and begun[-1] in pair.eos_ids):
        return float(score([text_of(pair, begun)], [prompt.reference])[0])
    distribution = next_logits(pair.verifier, ids, begun).double().softmax(-1)
    return sum(
        float(distribution[token]) * expected(pair, prompt, ids, [*begun, token], most)
        for token in range(len(distribution))
    )


@pytest.mark.parametrize("form", ["position", "token"])
def test_sampled_labels_are_within_their_stated_error_of_the_enumerated_gap(
    form: str, tmp_path: Path
) -> None:
    pair = tiny_pair("llama")
    prompts = [Prompt("a", "w1 w2 w3", "w4 w9 w7"), Prompt("b", "w5", "w8 w2")]
    traces = collected(
        pair, tmp_path, prompts, temperature=1.0, label_samples=300, label_form=form, max_new_tokens=2
    )
    encoded = encode_prompts(pair.tokenizer, prompts).kept
    gaps, errors = sequence_gap(traces).numpy(), traces.column("sequence_error")
    assert not np.isnan(gaps).any()
    seen = 0
    for number, (prompt, one) in enumerate(zip(prompts, encoded)):
        rows = np.flatnonzero(traces.column("prompt") == number)
        text = traces.column("token")[rows].tolist()
        for place, row in enumerate(rows):
            q, p = (
                next_logits(model, one.input_ids, text[:place]).double().softmax(-1)
                for model in (pair.drafter, pair.verifier)
            )
            worth = torch.tensor(
                [expected(pair, prompt, one.input_ids, [*text[:place], token], 2) for token in range(40)]
            )
            token = int(traces.column("sequence_token")[row])
            exact = float((p * worth).sum() - (worth[token] if form == "token" else (q * worth).sum()))
            assert abs(gaps[row] - exact) <= 4.5 * errors[row] + 1e-7
            assert 0 < errors[row] < 0.05
            assert (token >= 0) == (form == "token")
            seen += 1
    assert seen >= 3


def test_sampled_labels_do_not_depend_on_who_shares_a_batch(tmp_path: Path) -> None:
    """Prompts of unlike length end at unlike columns: rows that have ended stay beside the others for a while."""
    pair = tiny_pair("llama")
    sampled = {"prompts": make_prompts(10, seed=5), "temperature": 1.0, "label_samples": 2}
    together, alone = (
        collected(pair, tmp_path / str(size), batch_tokens=size, prefixes="reference", **sampled)
        for size in (4096, 1)
    )
    assert labelled_rows(alone).sum() > 30
    assert torch.equal(sequence_gap(together), sequence_gap(alone))


def test_both_sides_use_the_same_uniform_numbers(tmp_path: Path) -> None:
    """A drafter that is the verifier costs nothing, in every single sample."""
    pair = tiny_pair("llama")
    same = dataclasses.replace(pair, drafter=pair.verifier)
    traces = collected(same, tmp_path, temperature=1.0, label_samples=3)
    assert (sequence_gap(traces) == 0).all()
    assert (traces.column("sequence_error") == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_share": 0.0}, "label_share=0.0"),
        ({"label_samples": 2}, "at temperature 0: there is one continuation"),
        ({"label_form": "token"}, "at temperature 0"),
        ({"label_reference": "gold"}, "label_reference='gold'"),
        ({"label_metric": ["chrf", "chrf"]}, "name each metric once"),
        ({"label_scales": (1.0, 2.0)}, "label_scales"),
        ({"labels": "autojudge", "label_metric": ["chrf", "chrf1"]}, "compares by one metric"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_scores_that_fail_stop_the_run(tmp_path: Path) -> None:
    def failing(texts: Sequence[str], references: Sequence[str | None]) -> np.ndarray:
        return np.full(len(texts), np.nan)

    with pytest.raises(InputError, match=r"gaps have no score, more than 5%"):
        collect(
            CONFIG,
            tmp_path,
            progress=False,
            models=tiny_pair("t5"),
            prompts=PROMPTS,
            scores={"chrf1": failing},
        )


@pytest.mark.parametrize("fault", ["time.sleep(60)", "sys.exit(3)", "print('no json', flush=True)"])
def test_a_program_that_fails_stops_the_run(fault: str, tmp_path: Path) -> None:
    """Hanging, dying and talking nonsense on most texts; on few of them (under 5%) the places go unlabelled."""
    script = tmp_path / "score.py"
    script.write_text(
        f"import json, sys, time\nfor line in sys.stdin:\n    bad = len(json.loads(line)['text']) % 2\n    if bad:\n"
        f"        {fault}\n    print(json.dumps({{'score': 0.5}}), flush=True)\n"
    )
    name = f"command:{sys.executable} {script}"
    scores = make_scorers([name])
    scores[name].patience = 0.3 if "sleep" in fault else 20.0
    config = dataclasses.replace(CONFIG, label_metric=name)
    with pytest.raises(InputError, match=r"gaps have no score, more than 5%"):
        collect(
            config, tmp_path / "out", progress=False, models=tiny_pair("t5"), prompts=PROMPTS, scores=scores
        )
    scores[name].close()


def test_scales_and_drift_are_fixed_before_the_first_shard(tmp_path: Path) -> None:
    traces = collected(tiny_pair("t5"), tmp_path, label_metric=["chrf1", "sentence_bleu"])
    labels = traces.manifest.labels
    told = labelled_rows(traces).numpy()
    gaps = traces.column("sequence_gaps")[told]
    # With few prompts the first look is at all of them.
    assert labels["scales"] == pytest.approx(gaps.std(0).tolist(), rel=1e-4)
    assert labels["drift"]["words"] == pytest.approx(traces.column("sequence_words")[told].mean(), abs=1e-5)
    assert traces.column("sequence_gap")[told] == pytest.approx((gaps / labels["scales"]).mean(1), abs=1e-5)


def test_plan_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tell_plan(CONFIG, models=tiny_pair("t5"), prompts=PROMPTS, scores=make_scorers(["chrf1"]))
    said = capsys.readouterr()
    assert "places to label in 5 prompts" in said.out + said.err
    assert "tokens to generate" in said.out + said.err
    assert not list(tmp_path.iterdir())


def test_corpus_metrics_are_taken_at_the_corpus_of_the_path(tmp_path: Path) -> None:
    from sacrebleu.metrics import CHRF

    pair = tiny_pair("t5")
    traces = collected(pair, tmp_path, label_metric=["corpus_chrf"])
    own = {}
    for number in range(len(PROMPTS)):
        rows = traces.column("prompt") == number
        own[number] = text_of(pair, traces.column("token")[rows].tolist())
    encoded = encode_prompts(pair.tokenizer, PROMPTS, is_encoder_decoder=True).kept
    references = [[prompt.reference for prompt in PROMPTS]]
    base = CHRF().corpus_score(list(own.values()), references).score
    changes, gaps = [], []
    for row in np.flatnonzero(labelled_rows(traces).numpy()):
        number, place = int(traces.column("prompt")[row]), int(traces.column("position")[row])
        rows = traces.column("prompt") == number
        text = traces.column("token")[rows].tolist()
        kept = finish(
            pair, encoded[number].input_ids, [*text[:place], int(traces.column("sequence_token")[row])], 8
        )
        swapped = [*own.values()]
        swapped[number] = text_of(pair, kept)
        changes.append(len(PROMPTS) * (base - CHRF().corpus_score(swapped, references).score) / 100)
        gaps.append(float(traces.column("sequence_gap")[row]))
    assert max(map(abs, changes)) > 0.01
    # Linearised: an average text's place is taken, not this one's own.
    assert np.corrcoef(changes, gaps)[0, 1] > 0.95


def test_uniform_numbers_do_not_depend_on_the_batch() -> None:
    from deferral_train.collecting.sequence_sampling import Uniforms

    alone, together = Uniforms(["b"], 3, 5), Uniforms(["a", "b"], 3, 5)
    for position, sample in itertools.product(range(5), range(2)):
        assert alone.at(0, position, sample) == together.at(1, position, sample)
    assert alone.at(0, 1, 0) != alone.at(0, 1, 1) != alone.at(0, 2, 1)
