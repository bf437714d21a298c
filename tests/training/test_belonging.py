"""Sets of traces that do not belong together are refused by name; prompts are known by their text."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import tiny_models

from deferral_train.collecting import CollectConfig, collect
from deferral_train.errors import InputError
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.overlap import content_hash, write_training_ids
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces import open_traces
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit


def changed(source, target, change):
    """A copy of traces with another header."""
    shutil.copytree(source, target)
    path = target / "manifest.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))
    return str(target)


def refused(config, tmp_path, match, **changes):
    with pytest.raises(InputError, match=match) as caught:
        fit(replace(config, figure_every=0, **changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "checkpoints").exists()


FINGERPRINT = {"name": "a", "revision": None, "config": "c1", "weights": "w1"}
PAIR = {"drafter": FINGERPRINT, "verifier": FINGERPRINT, "tokenizer": "t1", "vocab_size": 12}


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ({"verifier": FINGERPRINT | {"weights": "w2"}}, "verifier.weights is w2, the first train traces' w1"),
        ({"drafter": FINGERPRINT | {"config": "c2"}}, "drafter.config is c2"),
        ({"tokenizer": "t2"}, "tokenizer is t2"),
        ({"vocab_size": 13}, "vocab_size is 13"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ],
)
@pytest.mark.parametrize("split", ["val", "train"])
def test_traces_of_another_pair(split, pair, said, config, folders, tmp_path):
    ours = PAIR | {"is_encoder_decoder": False}
    train = changed(folders["train"], tmp_path / "a", lambda header: header.update(pair=ours))
    other = changed(folders["val"], tmp_path / "b", lambda header: header.update(pair=ours | pair))
    sets = {"train": train, "val": other} if split == "val" else {"train": [train, other], "val": None}
    refused(config, tmp_path, f"data.{split}: traces of another pair, {said}", **sets)


def test_where_a_checkpoint_lies_is_no_other_pair(config, folders, tmp_path):
    moved = PAIR | {"verifier": FINGERPRINT | {"name": "b", "revision": "r"}}
    train = changed(folders["train"], tmp_path / "a", lambda header: header.update(pair=PAIR))
    val = changed(folders["val"], tmp_path / "b", lambda header: header.update(pair=moved))
    fit(replace(config, train=train, val=val, epochs=1, figure_every=0), tmp_path / "out")


@pytest.mark.parametrize("split", ["val", "train"])
def test_traces_of_another_temperature(split, config, folders, tmp_path):
    cold = changed(folders["val"], tmp_path / "cold", lambda header: header.update(temperature=0.0))
    sets = {"val": cold} if split == "val" else {"train": [config.train, cold], "val": None}
    refused(config, tmp_path, f"data.{split}: traces at temperature 0, the first train traces at 1", **sets)


def test_a_temperature_for_all_sets_joins_them(config, folders, tmp_path):
    cold = changed(folders["val"], tmp_path / "cold", lambda header: header.update(temperature=0.0))
    result = fit(replace(config, val=cold, temperature=0.0, epochs=1, figure_every=0), tmp_path / "out")
    assert result.head.metadata["training"]["temperature"] == 0.0


def test_another_teacher(config, folders, tmp_path):
    def taught(weights):
        return lambda header: header.update(
            truth="teacher", pair=PAIR | {"teacher": FINGERPRINT | {"weights": weights}}
        )

    train, val = (changed(folders[k], tmp_path / k, taught(k)) for k in ("train", "val"))
    refused(config, tmp_path, "teacher.weights is val", train=train, val=val, truth="teacher")
    fit(
        replace(config, train=train, val=val, epochs=1, figure_every=0), tmp_path / "out"
    )  # labels by reference


def test_another_number_of_candidates_for_a_head_that_learns_from_them(config, folders, tmp_path):
    from training.trace_maker import small_language, write_traces

    few = write_traces(tmp_path / "few", small_language(), 30, 10, seed=5, top_k=2)
    refused(
        config,
        tmp_path,
        "data.val: 2 logged candidates a row, the first train traces 4",
        val=str(few),
        head="token",
    )
    fit(
        replace(config, val=str(few), epochs=1, figure_every=0), tmp_path / "out"
    )  # a gap head reads none of them


def named(prefix, texts=None):
    def change(header):
        count = len(header["prompt_ids"])
        header["prompt_ids"] = [f"{prefix}{n}" for n in range(count)]
        if texts is None:
            header.pop("prompt_hashes", None)
        else:
            header["prompt_hashes"] = [content_hash(f"{texts} {n}") for n in range(count)]

    return change


def test_the_same_prompts_under_other_ids(config, folders, tmp_path):
    train = changed(folders["train"], tmp_path / "a", named("q", "text"))
    val = changed(folders["val"], tmp_path / "b", named("p", "text"))
    refused(
        config,
        tmp_path,
        r"60 prompts are in both train and val traces, first p0 \(there q0\)",
        train=train,
        val=val,
    )


def test_other_texts_under_the_ids_of_rows_and_under_ids_of_their_own(config, folders, tmp_path, caplog):
    train = changed(folders["train"], tmp_path / "a", named("data:", "one"))
    val = changed(folders["val"], tmp_path / "b", named("data:", "two"))
    with caplog.at_level(logging.WARNING):
        fit(replace(config, train=train, val=val, epochs=1, figure_every=0), tmp_path / "ok")
    assert "by id alone" not in caplog.text
    train = changed(folders["train"], tmp_path / "c", named("question-", "one"))
    val = changed(folders["val"], tmp_path / "d", named("question-", "two"))
    refused(config, tmp_path, "60 prompts are in both", train=train, val=val)


@pytest.mark.parametrize("without", ["a", "b"])
def test_traces_without_hashes_are_compared_by_id_and_say_so(without, config, folders, tmp_path, caplog):
    texts = {"a": "one", "b": "two"} | {without: None}
    train = changed(folders["train"], tmp_path / "a", named("data:", texts["a"]))
    val = changed(folders["val"], tmp_path / "b", named("data:", texts["b"]))
    refused(config, tmp_path, "60 prompts are in both", train=train, val=val)
    val = changed(folders["val"], tmp_path / "c", named("other:", texts["b"]))
    with caplog.at_level(logging.WARNING):
        fit(replace(config, train=train, val=val, epochs=1, figure_every=0), tmp_path / "ok")
    assert caplog.text.count("by id alone") == 1


def test_prompts_of_the_pairs_training_text_under_other_ids(config, folders, tmp_path):
    val = changed(folders["val"], tmp_path / "b", named("p", "a text of some length"))
    write_training_ids(tmp_path / "ids.json", [Prompt("elsewhere", "a text of some length 7")])
    refused(
        config, tmp_path, "1 of 60 prompts .* first p7", val=val, pair_training=str(tmp_path / "ids.json")
    )


def test_collected_traces_know_their_prompts_by_text(tmp_path):
    """Through collect: hashes of the kept prompts in their order, also in a selection; other ids hide nothing."""
    drafter, verifier, tokenizer = tiny_models.tiny_pair("llama", 0)
    pair = make_pair(drafter, verifier, tokenizer)
    texts = [f"w{n} w{n + 1} w{n + 2}" for n in range(12)]
    for name in ("fit", "val"):
        prompts = [
            Prompt("empty", "", "w1"),
            *(Prompt(f"{name}-{n}", t, "w3 w4 w5") for n, t in enumerate(texts)),
        ]
        config = CollectConfig(device="cpu", log_top_k=4)
        collect(config, tmp_path / name, progress=False, models=pair, prompts=prompts)
    traces = open_traces(tmp_path / "fit")
    assert traces.prompt_hashes == {f"fit-{n}": content_hash(text) for n, text in enumerate(texts)}
    assert traces.select_prompts(["fit-3"]).prompt_hashes == {"fit-3": content_hash(texts[3])}
    config = FitConfig(train=str(tmp_path / "fit"), val=str(tmp_path / "val"), features=("tv", "drafter_max"))
    with pytest.raises(
        InputError, match=r"12 prompts are in both train and val traces, first val-0 \(there fit-0\)"
    ):
        fit(config, tmp_path / "out")


@pytest.mark.parametrize("hashes", [["x"], "text", [1] * 60, {"a": 1}])
def test_damaged_hashes_are_one_line(hashes, folders, tmp_path):
    copy = changed(folders["val"], tmp_path / "a", lambda header: header.update(prompt_hashes=hashes))
    with pytest.raises(InputError, match="prompt_hashes"):
        open_traces(copy)
