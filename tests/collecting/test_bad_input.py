"""Bad input is one clear line, or a named and counted loss; never a silently short data set."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral_train.collecting import CollectConfig, collect
from deferral_train.commands.doctor import trace_folder
from deferral_train.errors import InputError
from deferral_train.pairs.load import ModelPair, make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces import open_traces
from deferral_train.traces.manifest import read_header

from .conftest import make_prompts, tiny, tiny_pair

CONFIG = CollectConfig(log_top_k=4, chunk_prompts=4, batch_tokens=64, device="cpu")
PROMPTS = make_prompts(10)


def run(pair: ModelPair, out: Path, prompts: list[Prompt] = PROMPTS, **changes: object) -> None:
    collect(dataclasses.replace(CONFIG, **changes), out, progress=False, models=pair, prompts=prompts)  # type: ignore[arg-type]


def notes(folder: Path) -> str:
    """What doctor remarks on about a sound folder."""
    return "\n".join(finding.text for finding in trace_folder(str(folder)) if finding.level == "note")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": "gold"}, "prefixes='gold': use reference, drafter, verifier or cascade"),
        ({"prefixes": "cascade"}, "a cascade needs a rule"),
        ({"rule": "opt:alpha=0.1"}, "a cascade needs a rule, nothing else takes one"),
        ({"hidden": "all"}, "hidden='all': use none, drafter, verifier, both"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"chunk_prompts": 0}, "chunk_prompts=0: must be at least 1"),
        ({"log_top_k": -1}, "log_top_k=-1"),
        ({"prefixes": "cascade", "rule": "optt:alpha=1"}, "optt"),
    ],
)
def test_settings_that_cannot_work(t5: ModelPair, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(t5, tmp_path / "out", **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_pairs_with_different_tokenizers_name_the_ids(tmp_path: Path) -> None:
    drafter, verifier, tokenizer = tiny.tiny_pair("t5")
    for model, name, own in (
        (drafter, "drafter", tiny.tiny_tokenizer("other")),
        (verifier, "verifier", tokenizer),
    ):
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    config = dataclasses.replace(
        CONFIG, drafter=str(tmp_path / "drafter"), verifier=str(tmp_path / "verifier")
    )
    with pytest.raises(
        InputError, match=r"tokenizers differ in 1 ids \(drafter / verifier\): 39 \('other' / 'w35'\)"
    ):
        collect(config, tmp_path / "out", progress=False, prompts=PROMPTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["drafter", "verifier"])
def test_logits_that_are_not_finite_are_named_counted_and_left_out(
    t5: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture, role: str, bad: float
) -> None:
    """One model's logits are spoilt wherever its likeliest token is a certain one: those positions go, no other."""
    run(t5, tmp_path / "good")
    good = open_traces(tmp_path / "good")
    spoilt = copy.deepcopy(getattr(t5, role))
    best = good.column(f"{role}_argmax")
    token = int(np.bincount(best).argmax())

    def spoil(module: torch.nn.Module, arguments: tuple, logits: torch.Tensor) -> torch.Tensor:
        at = logits[..., : t5.vocab_size].argmax(-1) == token
        return logits.masked_fill(at.unsqueeze(-1) & (torch.arange(logits.shape[-1]) == 7), bad)

    spoilt.get_output_embeddings().register_forward_hook(spoil)
    pair = dataclasses.replace(t5, **{role: spoilt})
    collect(CONFIG, tmp_path / "bad", progress=True, models=pair, prompts=PROMPTS)
    told = capsys.readouterr()
    found = open_traces(tmp_path / "bad", verify=True)
    prompt, lost = good.prompt_of_row, best == token
    assert found.nonfinite == lost.sum() > 0
    assert np.array_equal(found.column("position"), good.column("position")[~lost])
    assert np.array_equal(found.column("kl"), good.column("kl")[~lost])
    places = [place for record in found.records for place in record.nonfinite_at]
    first = int(np.flatnonzero(lost)[0])
    assert places[0] == (int(prompt[first]), int(good.column("position")[first]), role)
    name = good.manifest.prompt_ids[int(prompt[first])]
    said = f"{lost.sum()} positions left out for NaN or infinite logits; first: prompt {name}, position "
    assert said in told.out + told.err
    assert f"{lost.sum()} positions were left out" in notes(tmp_path / "bad")
    assert notes(tmp_path / "good") == ""


def test_a_pair_without_any_finite_logits_is_refused(t5: ModelPair, tmp_path: Path) -> None:
    broken = copy.deepcopy(t5.verifier)
    for values in broken.parameters():
        values.data.fill_(float("nan"))
    with pytest.raises(
        InputError, match=r"logits: all \d+ positions are NaN or infinite, .* holds no token; check"
    ):
        run(dataclasses.replace(t5, verifier=broken), tmp_path / "out")


def test_prompts_that_cannot_be_used_are_named_and_the_rest_collected(
    llama: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    long = " ".join(["w1"] * 200)
    prompts = [
        Prompt("long", long, "w2"),
        Prompt("empty", "w1", "  "),
        Prompt("none", "w1", None),
        Prompt("good", "w1 w2", "w3 w4 w5"),
        Prompt("tight", " ".join(["w1"] * 100), " ".join(["w2"] * 60)),
    ]
    collect(CONFIG, tmp_path, progress=True, models=llama, prompts=prompts)
    traces = open_traces(tmp_path)
    assert traces.prompt_ids == ("good",)
    assert len(traces) == 3
    reasons = dict(traces.manifest.prompts["skipped"])
    assert set(reasons) == {"long", "empty", "none", "tight"}
    assert "more than the limit" in reasons["long"]
    assert reasons["empty"] == "empty reference"
    assert "more than the models' 128 positions" in reasons["tight"]
    told = capsys.readouterr()
    assert "4 of 5 prompts left out; first: long: 200 tokens" in told.out + told.err
    assert "4 prompts were left out" in notes(tmp_path)


def test_no_usable_prompt_at_all(llama: ModelPair, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="none of 2 can be used; first: prompt a: no reference; without references"
    ):
        run(llama, tmp_path / "out", [Prompt("a", "w1"), Prompt("b", "w1")])


def test_references_are_cut_only_by_request_and_said_so(t5: ModelPair, tmp_path: Path) -> None:
    run(t5, tmp_path, max_new_tokens=3)
    traces = open_traces(tmp_path)
    assert max(traces.column("position")) == 2
    assert len(traces.manifest.prompts["cut"]) > 0


def test_resuming_with_a_changed_pair_prompts_or_settings_names_what_changed(
    t5: ModelPair, tmp_path: Path
) -> None:
    run(t5, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for message, pair, prompts, changes in (
        ("pair.drafter.weights", tiny_pair("t5", seed=1), PROMPTS, {}),
        ("prompts.sha256", t5, [*PROMPTS[:9], Prompt("q9", "w1", "w2")], {}),
        ("temperature: 1.0 -> 0.5", t5, PROMPTS, {"temperature": 0.5}),
        ("top_k: 4 -> 8", t5, PROMPTS, {"log_top_k": 8}),
        ("seed: 0 -> 1", t5, PROMPTS, {"seed": 1}),
        ("chunking.chunk_prompts: 4 -> 5", t5, PROMPTS, {"chunk_prompts": 5}),
        ("prefixes: reference -> drafter", t5, PROMPTS, {"prefixes": "drafter"}),
    ):
        with pytest.raises(InputError, match="was collected with other settings") as caught:
            run(pair, tmp_path, list(prompts), **changes)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_max_bytes_stops_before_the_limit_says_so_and_can_go_on(
    t5: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(t5, tmp_path / "whole")
    whole = open_traces(tmp_path / "whole")
    limit = whole.bytes * 3 // 4 + 2000
    out = tmp_path / "part"
    limited = dataclasses.replace(CONFIG, max_bytes=limit)
    collect(limited, out, progress=True, models=t5, prompts=PROMPTS)
    part = open_traces(out, verify=True)
    assert not part.complete
    assert 0 < part.bytes <= limit
    assert sum(path.stat().st_size for path in out.glob("shard-*")) <= limit
    assert set(part.prompt_ids) < set(whole.prompt_ids)
    told = capsys.readouterr()
    assert "stopped at max_bytes with 1 of 3 shards not collected" in told.out + told.err
    assert "2 of 3 shards: --max-bytes ended" in notes(out)
    run(t5, out)
    again = open_traces(out, verify=True)
    assert again.complete
    assert np.array_equal(again.column("kl"), whole.column("kl"))


def test_a_damaged_shard_is_collected_again_and_no_other(t5: ModelPair, tmp_path: Path) -> None:
    run(t5, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("shard-*")}
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    victim = tmp_path / "shard-00001.arrow"
    data = bytearray(before[victim.name])
    data[-3000] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(InputError, match="shard-00001"):
        open_traces(tmp_path, verify=True)
    run(t5, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("shard-*")}
    touched = {p.name for p in tmp_path.glob("shard-*") if p.stat().st_mtime_ns != times[p.name]}
    assert touched == {"shard-00001.arrow"}


def test_doctor_names_a_damaged_shard(t5: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from deferral_train.cli import main

    run(t5, tmp_path)
    assert main(["doctor", "--traces", str(tmp_path)]) == 0
    victim = tmp_path / "shard-00002.arrow"
    victim.write_bytes(victim.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["doctor", "--traces", str(tmp_path)]) == 2
    assert "shard-00002.arrow" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    t5: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deferral_train.traces.folder import Folder

    monkeypatch.setattr(Folder, "free_bytes", lambda self: 1000)
    with pytest.raises(InputError, match=r"about \d+ kB are needed, 1 kB are free; use max_bytes"):
        run(t5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_announcement_says_tokens_time_and_bytes(
    t5: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    collect(CONFIG, tmp_path, progress=True, models=t5, prompts=PROMPTS)
    told = capsys.readouterr()
    text = told.out + told.err
    tokens = len(open_traces(tmp_path))
    said = re.search(r"collect: (\d+) tokens of 10 prompts in 3 shards, about (\d+) s, (\d+) kB to", text)
    assert said is not None
    assert int(said[1]) == tokens
    written = open_traces(tmp_path).bytes / 1000
    assert written <= int(said[3]) < written + 9  # at most so much for what Arrow adds to three shards
    assert "tok/s" in text
    assert f"{written:.0f} kB]" in text


def test_the_command_collects_from_files_and_addresses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from deferral_train.cli import main

    drafter, verifier = tiny.save_tiny_pair("llama", tmp_path / "pair")
    source = tmp_path / "prompts.jsonl"
    rows = [{"id": p.id, "prompt": p.prompt, "reference": p.reference} for p in PROMPTS]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--drafter", str(drafter), "--verifier", str(verifier), "--prompts", f"file://{source}"]
    assert main(["collect", "--out", f"file://{tmp_path}/out", *common, "--log-top-k=0", "--device=cpu"]) == 0
    traces = open_traces(tmp_path / "out", verify=True)
    assert traces.prompt_ids == tuple(p.id for p in PROMPTS)
    assert read_header(traces._shards[0].folder).pair["drafter"]["weights"]
    assert main(["collect", "--out", str(tmp_path / "o"), *common[:4], "--prompts=/no/file.jsonl"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("deferral-train collect: error:")
    assert "/no/file.jsonl" in message


def test_infinite_hidden_states_are_kept_within_16_bit(t5: ModelPair) -> None:
    from deferral_train.collecting.scoring import half

    assert half(torch.tensor([1e9, -1e9, 1.5])).tolist() == [65504.0, -65504.0, 1.5]


def test_models_handed_over_are_told_apart(t5: ModelPair) -> None:
    from deferral_train.collecting.plan import fingerprint

    other = make_pair(*tiny.tiny_pair("t5", seed=2))
    assert fingerprint(t5.verifier) == fingerprint(copy.deepcopy(t5.verifier))
    assert fingerprint(t5.verifier) != fingerprint(other.verifier)
