"""Judge labels against plain one-by-one references: no cache, no batch, no padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deferral_train.collecting import CollectConfig, collect
from deferral_train.commands import collect as collect_command
from deferral_train.errors import InputError
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import ModelPair
from deferral_train.traces import Traces, open_traces
from deferral_train.traces.judged import acceptable, judged_rows, resolve_truth
from deferral_train.traces.sequence import argmax_summary

from .conftest import make_prompts, tiny_pair

PROMPTS = [  # some without a reference: their own text is what must not change
    dataclasses.replace(prompt, reference=prompt.reference if number % 3 == 0 else None)
    for number, prompt in enumerate(make_prompts(6, seed=4))
]
CONFIG = CollectConfig(
    prefixes="verifier", temperature=0.0, labels="selfjudge", label_window=4, max_new_tokens=9, log_top_k=0,
    chunk_prompts=4, batch_tokens=90, device="cpu",
)  # fmt: skip


def collected(pair: ModelPair, out: Path, scorer: Any = None, **changes: Any) -> Traces:
    config = dataclasses.replace(CONFIG, **changes)
    scores = None if scorer is None else {config.metrics[0]: scorer}
    collect(config, out, progress=False, models=pair, prompts=PROMPTS, scores=scores)
    return open_traces(out)


def prompt_ids(pair: ModelPair) -> dict[str, list[int]]:
    encoded = encode_prompts(pair.tokenizer, PROMPTS, is_encoder_decoder=pair.is_encoder_decoder)
    return {one.id: one.input_ids for one in encoded.kept}


@torch.no_grad()
def run(model: Any, prompt: Sequence[int], text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """log P of the token at every place behind the prompt and one more [L + 1, V], and the states that give them."""
    if model.config.is_encoder_decoder:
        ids = torch.tensor([[model.config.decoder_start_token_id, *text]])
        output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids, output_hidden_states=True)
        logits, states = output.logits[0], output.decoder_hidden_states[-1][0]
    else:
        output = model(input_ids=torch.tensor([[*prompt, *text]]), output_hidden_states=True)
        logits, states = (one[0, len(prompt) - 1 :] for one in (output.logits, output.hidden_states[-1]))
    return logits[:, :40].double().log_softmax(-1), states


def texts_of(traces: Traces) -> dict[str, list[int]]:
    """Each prompt's rows, in order."""
    numbers = traces.prompt_of_row.tolist()
    return {
        name: [row for row, number in enumerate(numbers) if number == place]
        for place, name in enumerate(traces.manifest.prompt_ids)
    }


@pytest.mark.parametrize("kind", ["t5", "llama", "gemma2"])
def test_scores_are_those_of_one_substitution_at_a_time(kind: str, tmp_path: Path) -> None:
    pair = tiny_pair(kind, seed=2)
    traces = collected(pair, tmp_path / "traces")
    tokens, favourites = traces.column("token").tolist(), traces.column("drafter_argmax").tolist()
    scores = torch.from_numpy(traces.column("judge_score").copy())
    states = torch.from_numpy(traces.column("verifier_hidden_at_token").copy()).float()
    expected, states_expected = torch.zeros_like(scores), torch.zeros_like(states)
    for name, rows in texts_of(traces).items():
        prompt, text = prompt_ids(pair)[name], [tokens[row] for row in rows]
        own, own_states = run(pair.verifier, prompt, text)
        for place, row in enumerate(rows):
            if favourites[row] == text[place]:
                states_expected[row] = own_states[place + 1] if place + 1 < len(text) else 0.0
                continue
            swapped = [*text[:place], favourites[row], *text[place + 1 :]]
            other, other_states = run(pair.verifier, prompt, swapped)
            end = min(len(text), place + 1 + 4)
            expected[row] = sum(float(other[at, swapped[at]] - own[at, text[at]]) for at in range(place, end))
            states_expected[row] = other_states[place + 1]
    assert int((expected != 0).sum()) > 8
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(states, states_expected, atol=2e-2, rtol=2e-3)


def agreement(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Share of the words of the longer text that stand at the same place in the other."""
    pairs = [(text.split(), other.split()) for text, other in zip(texts, references)]
    return [sum(a == b for a, b in zip(*both)) / max(1, *map(len, both)) for both in pairs]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_mined_labels_are_those_of_a_plain_search(kind: str, tmp_path: Path) -> None:
    pair = tiny_pair(kind, seed=2)
    traces = collected(pair, tmp_path / "traces", agreement, labels="autojudge", label_tolerance=0.05)
    assert traces.manifest.labels == {"kind": "autojudge", "metric": "chrf", "tolerance": 0.05, "hidden": 32}
    tokens = traces.column("token").tolist()
    scores = traces.column("judge_score").astype(int).tolist()
    found = set()
    references = {one.id: one.reference for one in PROMPTS}
    for name, rows in texts_of(traces).items():
        text, labels = plain_search(pair, prompt_ids(pair)[name], references[name], 0.05)
        assert [tokens[row] for row in rows] == text
        assert [scores[row] for row in rows] == labels
        found |= set(labels)
    assert found == {-1, 0, 1}


@torch.no_grad()
def plain_search(
    pair: ModelPair, prompt: list[int], reference: str | None, tolerance: float
) -> tuple[list[int], list[int]]:
    """The search with transformers' own generate on one prompt."""

    def finish(begun: list[int]) -> list[int]:
        text = list(begun)
        while len(text) < 9 and (not text or text[-1] not in pair.eos_ids):
            text.append(int(run(pair.verifier, prompt, text)[0][-1].argmax()))
        return text

    def words(text: list[int]) -> str:
        return pair.tokenizer.decode(text, skip_special_tokens=True)

    text = finish([])
    against = words(text) if reference is None else reference

    def quality(text: list[int]) -> float:
        return agreement([words(text)], [against])[0]

    own, labels = quality(text), []
    place = 0
    while place < len(text):
        favourite = int(run(pair.drafter, prompt, text[:place])[0][-1].argmax())
        label = 0
        if favourite != text[place]:
            other = finish([*text[:place], favourite])
            label = 1 if own - quality(other) <= tolerance else -1
            text = other if label == 1 else text
        labels.append(label)
        place += 1
    return text, labels


def test_a_rate_sets_the_threshold_on_judged_tokens(t5: ModelPair, tmp_path: Path) -> None:
    traces = collected(t5, tmp_path / "traces")
    truth = resolve_truth("judge:rate=0.25", traces)
    judged = judged_rows(traces)
    share = float(acceptable(traces, truth)[judged].double().mean())
    assert abs(share - 0.25) <= 1 / int(judged.sum())
    assert bool(acceptable(traces, truth)[~judged].all())
    assert resolve_truth(truth, traces) == truth
    summary = argmax_summary(traces, ["token", "verifier_logprob", "drafter_max"])
    assert torch.equal(summary.token, traces.summary(["drafter_argmax"]).drafter_argmax)
    logged = traces.summary(["verifier_logprob", "drafter_logprob"])
    assert torch.allclose(summary.verifier_logprob[~judged], logged.verifier_logprob[~judged], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "judges"}, "labels='judges': use selfjudge, autojudge or sequence"),
        ({"prefixes": "reference"}, "use prefixes verifier, temperature 0"),
        ({"temperature": 1.0}, "use prefixes verifier, temperature 0"),
        ({"label_window": 0}, "label_window=0: must be at least 1"),
        ({"label_tolerance": -0.1}, "label_tolerance=-0.1: use a finite number >= 0"),
        ({"labels": "autojudge"}, "labels='autojudge': no scorer for chrf; pass scores={'chrf': ...}"),
    ],
)
def test_labels_that_cannot_be_made(t5: ModelPair, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        collected(t5, tmp_path / "out", **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("judge", "selfjudge scores need a finite threshold"),
        ("judge:tau=inf", "need a finite threshold"),
        ("judge:tau=low", "need a finite threshold"),
        ("judge:rate=1.5", "rate must lie between 0 and 1"),
    ],
)
def test_thresholds_that_cannot_be_meant(t5: ModelPair, labelled: Traces, truth: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_truth(truth, labelled)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_serving_engine_makes_no_judge_labels(tmp_path: Path) -> None:
    config = CollectConfig("d", "v", "p", prefixes="verifier", temperature=0.0, labels="selfjudge")
    with pytest.raises(InputError, match=r"labels='selfjudge' with engine 'vllm'.*use engine transformers"):
        collect_command.run(config, str(tmp_path), engine="vllm")


def test_traces_without_labels_are_named(t5: ModelPair, tmp_path: Path) -> None:
    traces = collected(t5, tmp_path / "traces", labels=None)
    with pytest.raises(InputError, match="no judge labels; collect with --labels"):
        resolve_truth("judge:tau=-1", traces)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    return collected(tiny_pair("t5"), tmp_path_factory.mktemp("labelled") / "traces")
