"""Everything that cannot be trained on is refused by name before training starts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from training.trace_maker import small_language, write_traces

from deferral_train.errors import InputError
from deferral_train.pairs.overlap import write_training_ids
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces import Chunk, Manifest, TraceWriter, open_traces, prepare_folder
from deferral_train.training.fit import fit


def refused(config, out, match, **changes):
    with pytest.raises(InputError, match=match) as caught:
        fit(replace(config, **changes), out)
    assert "\n" not in str(caught.value)
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"features": ("drafter_max", "verifier_hidden")}, "verifier_hidden"),
        ({"features": ("draft_position",)}, "draft_position"),
        ({"features": ("drafter_logprob",)}, "leak"),
        ({"features": ("nonsense",)}, "nonsense"),
        ({"stage": "draft"}, "draft-stage"),
        ({"head": "tree"}, "tree"),
        ({"alphas": (0.0, 99.0)}, "alpha grid"),
        ({"alphas": ()}, "alpha grid"),
        ({"truth": "teacher"}, "teacher"),
        ({"truth": "guess"}, "guess"),
        ({"temperature": 0.7}, "temperature"),
        ({"val": None, "val_fraction": 1.5}, "fractions"),
        ({"batch_size": 0}, "batch_size"),
        ({"objective": "hinge"}, "hinge"),
        ({"objective": "likelihood"}, "likelihood"),
        ({"optimizer": "adamax"}, "adamax"),
        ({"train": "/nowhere/at/all"}, "nowhere"),
    ],
)
def test_settings(config, tmp_path, changes, match):
    refused(config, tmp_path / "out", match, **changes)


def test_shared_prompts(config, tmp_path):
    refused(config, tmp_path / "out", "both train and val", val=config.train)


def test_prompts_that_the_pair_was_trained_on(config, tmp_path):
    first = open_traces(config.train).prompt_ids[0]
    write_training_ids(tmp_path / "training_ids.json", [Prompt(first, "a text", None)])
    refused(config, tmp_path / "out", first, pair_training=str(tmp_path / "training_ids.json"))


def test_traces_of_another_schema(config, folders, tmp_path):
    copy = tmp_path / "traces"
    copy.mkdir()
    for file in folders["train"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    header = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**header, "schema_version": 99}))
    refused(config, tmp_path / "out", "schema_version=99", train=str(copy))


def test_validation_traces_of_another_vocabulary(config, folders, tmp_path):
    copy = tmp_path / "traces"
    shutil.copytree(folders["val"], copy)
    header = json.loads((copy / "manifest.json").read_text())
    header["pair"] = {**header["pair"], "vocab_size": 99}
    (copy / "manifest.json").write_text(json.dumps(header))
    refused(config, tmp_path / "out", "data.val: traces of another pair, vocab_size is 99", val=str(copy))


def altered(source, target, **columns):
    """A copy of traces with some columns replaced, through the public writer."""
    traces = open_traces(source)
    manifest = traces.manifest
    values = {name: columns.get(name, traces.column(name)) for name in traces.columns}
    prepare_folder(str(target), manifest)
    TraceWriter(str(target), manifest).write(manifest.chunks[0], values)
    return str(target)


def test_one_class_labels(config, folders, tmp_path):
    traces = open_traces(folders["train"])
    same = altered(
        folders["train"],
        tmp_path / "t",
        gold=traces.column("verifier_argmax"),
        verifier_argmax=traces.column("drafter_argmax"),
    )
    refused(config, tmp_path / "out", "one class", train=same)


def test_nan_features(config, folders, tmp_path):
    bad = open_traces(folders["train"]).column("verifier_max").copy()
    bad[5] = np.nan
    refused(
        config,
        tmp_path / "out",
        "verifier_max is not finite in 1",
        train=altered(folders["train"], tmp_path / "t", verifier_max=bad),
    )


def test_an_empty_split(config, tmp_path):
    manifest = Manifest(
        pair={},
        prefixes="reference",
        prompt_ids=("a",),
        chunks=(Chunk(0, 0, ((0,),)),),
        top_k=4,
        truth="exact",
    )
    prepare_folder(str(tmp_path / "t"), manifest)
    empty = {name: np.zeros(0) for name in manifest.layout.columns}
    TraceWriter(str(tmp_path / "t"), manifest).write(manifest.chunks[0], empty)
    refused(config, tmp_path / "out", "empty split", train=str(tmp_path / "t"))


def test_token_head_without_candidates(config, tmp_path):
    bare = write_traces(tmp_path / "t", small_language(), 10, 10, seed=9, top_k=0)
    refused(config, tmp_path / "out", "log-top-k", train=str(bare), head="token")
