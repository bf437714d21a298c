"""Sequence labels whose texts vLLM finishes, against those of transformers; killed, gone on with, refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from engines import greedy_text, save_pair

from deferral_train.cli import main
from deferral_train.collecting import CollectConfig, collect
from deferral_train.errors import InputError
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import load_models
from deferral_train.pairs.prompts import read_prompts
from deferral_train.traces import open_traces

MOST, TIE = 16, 1e-4
SETTINGS = {
    "prefixes": "verifier", "temperature": 0.0, "labels": "sequence", "max_new_tokens": MOST, "log_top_k": 4,
    "hidden": "verifier", "chunk_prompts": 4, "device": "cpu", "dtype": "float32",
}  # fmt: skip
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair and prompts with references."""
    base = tmp_path_factory.mktemp("labels")
    save_pair(base)
    generator = np.random.default_rng(0)

    def words(most):
        return " ".join(f"w{number}" for number in generator.integers(0, 30, generator.integers(1, most + 1)))

    rows = [
        json.dumps({"id": str(number), "prompt": words(8), "reference": words(12)}) for number in range(COUNT)
    ]
    (base / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return base


@pytest.fixture(scope="module")
def pair(folder):
    return load_models(folder / "drafter", folder / "verifier", "cpu", "float32")


@pytest.fixture(scope="module")
def engine(folder):
    from deferral_train.serving.running import EngineSettings
    from deferral_train.serving.writing import WritingEngine

    with WritingEngine(
        EngineSettings(str(folder / "verifier"), dtype="float32", context=64), sampled=True
    ) as engine:
        yield engine


def config_of(folder, **changes):
    """Settings over the folder's pair and prompts."""
    named = {role: str(folder / role) for role in ("drafter", "verifier")}
    return CollectConfig(**named, prompts=str(folder / "prompts.jsonl"), **{**SETTINGS, **changes})


def collected(folder, out, engine=None, **changes):
    config = config_of(folder, **changes)
    collect(config, out, False, scores=make_scorers(config.metrics), engine=engine)
    return open_traces(out, verify=True)


def unequal(found, expected):
    """Rows whose label differs; every other column is the same."""
    assert len(found) == len(expected) > 100
    differ = np.zeros(len(found), dtype=bool)
    for name in expected.columns:
        one, other = found.column(name), expected.column(name)
        if not name.startswith("sequence_"):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
            continue
        same = np.isclose(one, other, rtol=0, atol=1e-6, equal_nan=True)
        differ |= ~same.reshape(len(found), -1).all(1)
    return np.flatnonzero(differ)


@torch.no_grad()
def closest(pair, prompt, text):
    """Least margin between the verifier's first and second token along its greedy text behind a beginning."""
    tokens, least = list(text), np.inf
    while len(tokens) < MOST and tokens[-1] not in pair.eos_ids:
        two = pair.verifier(torch.tensor([[*prompt, *tokens]])).logits[0, -1].topk(2)
        least = min(least, float(two.values[0] - two.values[1]))
        tokens.append(int(two.indices[0]))
    return least


def explained(pair, folder, traces, row):
    """True where one of the row's two finished texts comes within `TIE` of a tie."""
    prompts = encode_prompts(pair.tokenizer, read_prompts(folder / "prompts.jsonl")).kept
    number, place = int(traces.column("prompt")[row]), int(traces.column("position")[row])
    ids = {prompt.id: prompt.input_ids for prompt in prompts}[traces.manifest.prompt_ids[number]]
    text = traces.column("token")[traces.column("prompt") == number][:place].tolist()
    favourites = [int(traces.column(f"{role}_argmax")[row]) for role in ("drafter", "verifier")]
    return any(closest(pair, ids, [*text, token]) <= TIE for token in favourites)


@pytest.mark.engine
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefixes": "cascade", "rule": "opt:alpha=0.2", "label_share": 0.7},
        {"prefixes": "reference"},
        {"label_reference": "verifier", "label_metric": ["chrf1"], "chunk_prompts": 9, "batch_tokens": 100},
    ],
    ids=["verifier", "cascade", "reference", "own"],
)
def test_labels_equal_those_of_transformers(changes, folder, pair, engine, tmp_path):
    expected = collected(folder, tmp_path / "transformers", **changes)
    found = collected(folder, tmp_path / "vllm", engine, **changes)
    assert np.isfinite(expected.column("sequence_gap")).sum() > 40
    assert (np.nan_to_num(expected.column("sequence_gap")) != 0).sum() > 20
    ties = [row for row in unequal(found, expected) if explained(pair, folder, expected, row)]
    assert list(unequal(found, expected)) == ties
    assert len(ties) <= 0.02 * len(expected)
    assert found.manifest.settings["engine"] == {
        "engine": engine.engine.name,
        "runner": "V1",
        "dtype": "float32",
    }
    assert "engine" not in expected.manifest.settings


@pytest.mark.engine
@pytest.mark.parametrize("form", ["position", "token"])
def test_sampled_labels_draw_by_the_same_numbers(form, folder, engine, tmp_path):
    """The text of a branch is a function of its numbers, whoever runs the verifier."""
    changes = {"temperature": 0.8, "label_samples": 3, "label_form": form, "label_share": 0.4}
    expected = collected(folder, tmp_path / "transformers", **changes)
    found = collected(folder, tmp_path / "vllm", engine, **changes)
    assert np.isfinite(expected.column("sequence_gap")).sum() > 40
    # A number within rounding of the edge between two tokens may fall on the other side.
    assert len(unequal(found, expected)) <= 0.02 * len(expected)


@pytest.mark.engine
def test_a_text_that_the_engine_has_no_room_for_is_refused_not_cut(engine):
    with pytest.raises(InputError, match=r"60 tokens and 5 more exceed the engine's context of 64"):
        engine.write([[5] * 10, [5] * 60], [5, 5], 40)


@pytest.mark.engine
def test_a_verifier_wider_than_the_pairs_vocabulary_never_writes_padding(folder, engine):
    """Ids beyond the pair's vocabulary are no tokens, however probable."""
    beginnings = [[5, 6, 7], [9, 8], [30]]
    whole = engine.write(beginnings, [12] * 3, 40)
    cut = max(token for text in whole for token in text)
    narrow = engine.write(beginnings, [12] * 3, cut)
    assert max(token for text in narrow for token in text) < cut
    assert [len(text) for text in narrow] == [12] * 3 or 1 in [text[-1] for text in narrow]


@torch.no_grad()
def drawn_one_by_one(pair, beginning, numbers, temperature):
    """The reference: every token by the inverse of the cumulative distribution, a pass over the whole text each."""
    text = []
    for number in numbers:
        logits = pair.verifier(torch.tensor([[*beginning, *text]])).logits[0, -1].double()
        below = (logits / temperature).softmax(-1).cumsum(-1)
        text.append(int((below <= number * below[-1]).sum()))
        if text[-1] in pair.eos_ids:
            break
    return text


def written_as_the_reference_says(folder, pair, engine, count):
    """Greedy and numbered requests side by side with plain ones, of unlike lengths, more than run at once."""
    generator = np.random.default_rng(5)
    beginnings = [generator.integers(4, 40, generator.integers(1, 20)).tolist() for _ in range(count)]
    most = generator.integers(1, 9, len(beginnings)).tolist()
    numbers = [generator.random(count).tolist() for count in most]
    found = engine.write(beginnings, most, 40, 0.7, numbers)
    expected = [drawn_one_by_one(pair, *both, 0.7) for both in zip(beginnings, numbers)]
    assert found == expected
    assert len({tuple(text) for text in found}) > len(found) // 2
    greedy = engine.write(beginnings[:8], [6] * 8, 40)
    for beginning, text in zip(beginnings, greedy):
        own = greedy_text(folder, [beginning], 6)[0]
        ends = [place for place, token in enumerate(own) if token in pair.eos_ids]
        assert text == (own[: ends[0] + 1] if ends else own)


@pytest.mark.engine
def test_numbered_requests_draw_what_their_numbers_say(folder, pair, engine):
    written_as_the_reference_says(folder, pair, engine, 80)


@pytest.mark.engine
@pytest.mark.v2
def test_numbered_requests_draw_what_their_numbers_say_on_v2(folder, pair):
    from deferral_train.serving.running import EngineSettings
    from deferral_train.serving.writing import WritingEngine

    with WritingEngine(
        EngineSettings(str(folder / "verifier"), dtype="float32", context=64, at_once=8), sampled=True
    ) as engine:
        assert engine.facts["runner"] == engine.engine.runner == "V2"
        written_as_the_reference_says(folder, pair, engine, 24)


COMMAND = "import sys; from deferral_train.cli import main; raise SystemExit(main(sys.argv[1:]))"


@pytest.mark.engine
def test_a_killed_collection_goes_on_and_its_labels_are_the_same(folder, engine, tmp_path):
    """SIGKILL once a shard is there and another begun; the same command goes on behind it."""
    whole = collected(folder, tmp_path / "whole", engine, chunk_prompts=2)
    out = tmp_path / "killed"
    words = ["collect", "--engine", "vllm", "--out", str(out), "--prompts", str(folder / "prompts.jsonl")]
    words += ["--drafter", str(folder / "drafter"), "--verifier", str(folder / "verifier")]
    for name, value in {**SETTINGS, "chunk_prompts": 2}.items():
        words += [f"--{name}", str(value)]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def finished() -> int:
        return sum(path.read_text().count("\n") for path in out.glob("chunks*.jsonl"))

    while process.poll() is None and not finished():
        time.sleep(0.005)
    process.kill()
    said = process.communicate()[0].decode()
    assert 0 < finished() < COUNT // 2, said[-2000:]
    again = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert "shards are there already" in again.stdout + again.stderr
    found = open_traces(out, verify=True)
    assert found.complete
    assert [record.sha256 for record in found.records] == [record.sha256 for record in whole.records]
    assert main([word.replace("vllm", "transformers") if word == "vllm" else word for word in words]) == 2


def refusal(capsys, folder, *words):
    """What the command says of words that it refuses."""
    named = ["--drafter", str(folder / "drafter"), "--verifier", str(folder / "verifier")]
    capsys.readouterr()
    status = main(
        ["collect", "--engine", "vllm", *named, "--prompts", str(folder / "prompts.jsonl"), "--out", "never",
         "--temperature", "0", "--prefixes", "verifier", *words]
    )  # fmt: skip
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "selfjudge"], "labels='selfjudge' with engine 'vllm'.*use engine transformers"),
        (["--labels", "sequence", "--devices", "2"], "devices=2, num_nodes=1 with engine 'vllm'.*start one"),
        (
            ["--labels", "sequence", "--device_map", "auto"],
            "device_map='auto' with engine 'vllm'.*leave it out",
        ),
        (["--labels", "sequence", "--engine", "sglang"], "engine='sglang': use transformers or vllm"),
        (["--plan", "true"], "plan: it tells the cost of labels 'sequence', not of None"),
        ([], "prefixes='verifier' with --engine vllm.*use --prefixes cascade"),
    ],
)
def test_what_the_engine_cannot_label_is_refused_by_name(
    words, message, folder, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refusal(capsys, folder, *words))
    assert not list(tmp_path.glob("never/*.arrow"))


@pytest.mark.engine
def test_pairs_and_folders_that_the_engine_cannot_go_on_with(folder, engine, capsys, tmp_path):
    from tiny_models import save_tiny_pair

    save_tiny_pair("t5", tmp_path / "t5")
    words = [
        "--labels",
        "sequence",
        "--out",
        str(tmp_path / "never"),
        "--prompts",
        str(folder / "prompts.jsonl"),
    ]
    assert "is an encoder-decoder" in refusal(capsys, tmp_path / "t5", *words)
    collected(folder, tmp_path / "other", label_metric=["chrf1"])
    with pytest.raises(InputError, match=r"settings\.engine"):
        collected(folder, tmp_path / "other", engine, label_metric=["chrf1"])
