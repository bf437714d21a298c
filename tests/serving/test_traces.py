"""Traces from live traffic: what they hold, what they never hold up, and the way from traffic to a served head."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import (
    DRAFTS,
    check_rows,
    counts,
    generate,
    loop,
    per_block,
    prompts,
    save_pair,
    seam_of,
    start,
    stop,
    use,
)

from deferral_train.errors import InputError
from deferral_train.rules import make_rule, summarize
from deferral_train.serving import trace_log
from deferral_train.serving.blocks import DraftedRows, Outcome, RowSettings, verify
from deferral_train.serving.config import LogConfig, ServingConfig
from deferral_train.serving.counters import Counters
from deferral_train.serving.layout import Step
from deferral_train.serving.resume import finished_part
from deferral_train.serving.seam import Seam
from deferral_train.serving.trace_log import TraceLog
from deferral_train.traces import open_traces, read_candidates
from deferral_train.traces.folder import open_folder

V, T = 11, 3
PAIR = {"vocab_size": 10, "tokenizer": "t", "dtype": {}}


def logged(folder, **settings):
    config = ServingConfig(rule="opt:alpha=0.2", log=LogConfig(str(folder), fraction=1.0, **settings))
    counters = Counters()
    return TraceLog(config, PAIR, counters), counters


def step_of(names, seed=0, start=0):
    """A verified step of these requests, with a padding column beyond the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    count = len(names)
    verifier = torch.randn(count, T, V, generator=generator)
    drafter = verifier + torch.randn(count, T, V, generator=generator)
    verifier[..., 10:] = drafter[..., 10:] = -50.0
    drafted = torch.multinomial(drafter.softmax(-1).view(-1, V), 1, generator=generator).view(count, T)
    rows = DraftedRows(drafted, torch.full((count,), T), verifier, [1.0] * count, drafter, [True] * count)
    numbers = torch.rand(count, T + 1, generator=generator, dtype=torch.float64)
    outcome = verify(rows, [RowSettings(make_rule("opt", alpha=0.2))] * count, numbers)
    positions = start + torch.arange(T).expand(count, T)
    step = Step(
        list(range(count)), names, [], drafted, rows.lengths, [T] * count, [1.0] * count, {}, positions
    )
    return step, rows, outcome


def test_rows_are_those_of_emitted_drafted_positions_with_the_distributions_there(tmp_path):
    log, counters = logged(tmp_path / "t", top_k=4)
    names = [f"r{n}" for n in range(6)]
    steps = [step_of(names, seed) for seed in (1, 2)]
    for number, (step, rows, outcome) in enumerate(steps):
        step.positions = step.positions + 10 * number
        log.take(step, rows, outcome, rows.verifier, range(6))
    log.finished(names[:4])
    log.close()
    traces = open_traces(tmp_path / "t", verify=True)
    assert traces.manifest.prefixes == "cascade:opt:alpha=0.2"
    assert sorted(traces.prompt_ids) == names
    place = 0
    for prompt in traces.manifest.prompt_ids:
        row = names.index(prompt)
        for number, (_, rows, outcome) in enumerate(steps):
            accepted = int(outcome.accepted[row])
            count = min(accepted + 1, T)
            token = rows.drafted[row, :count].clone()
            if accepted < T:
                token[accepted] = outcome.correction[row]
            at = slice(place, place + count)
            place += count
            expected = summarize(rows.drafter[row, :count, :10], rows.verifier[row, :count, :10], token=token)
            for name in ("kl", "drafter_max", "verifier_logprob", "tv", "token", "js"):
                np.testing.assert_allclose(traces.column(name)[at], expected[name], rtol=1e-5, atol=1e-6)
            assert traces.column("position")[at].tolist() == list(range(10 * number, 10 * number + count))
            assert traces.column("draft_position")[at].tolist() == list(range(count))
            assert traces.column("origin")[at].tolist() == outcome.origin[row, :count].tolist()
    assert place == len(traces) == counters.get("log_rows")
    assert (counters.get("log_requests"), counters.get("log_dropped"), counters.get("log_faults")) == (
        6,
        0,
        0,
    )
    assert read_candidates(traces, np.arange(len(traces))) is not None
    assert not (tmp_path / "t" / "prompts.jsonl").exists()


def test_a_full_queue_drops_traces_and_never_waits(tmp_path):
    log, counters = logged(tmp_path / "t", queue=2)
    gate = threading.Event()
    original = log._columns
    log._columns = lambda blocks: (gate.wait(20), original(blocks))[1]
    step, rows, outcome = step_of([f"r{n}" for n in range(8)])
    log.take(step, rows, outcome, rows.verifier, range(8))  # returns although nothing is being written
    gate.set()
    log.finished(step.names)
    log.close()
    kept = len(open_traces(tmp_path / "t").prompt_ids)
    assert 2 <= kept <= 3
    assert counters.get("log_dropped") == 8 - kept


def test_a_killed_log_is_continued_behind_its_last_whole_shard(tmp_path):
    def feed(log, names, seed):
        step, rows, outcome = step_of(names, seed)
        log.take(step, rows, outcome, rows.verifier, range(len(names)))
        for name in names:
            log.started(name, None, f"corpus:{name}")
        log.finished(names)

    def settled(log):
        end = time.monotonic() + 20
        while log._waiting.qsize() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)  # the last message may still be at work

    settings = {"rows_per_shard": 1, "resume": True, "names": True, "settings": {"max_new_tokens": 9}}
    folder = tmp_path / "t"
    killed, _ = logged(folder, **settings)
    for number in range(3):
        feed(killed, [f"{number}"], number)
    settled(killed)  # and never closed
    whole, records = finished_part(open_folder(str(folder)))
    assert whole.prompt_ids == ("corpus:0", "corpus:1", "corpus:2")
    # Killed once more between header and ledger, and a shard is cut.
    lines = (folder / "chunks.jsonl").read_text().splitlines(keepends=True)
    (folder / "chunks.jsonl").write_text("".join(lines[:2]))
    (folder / records[1].file).write_bytes(b"cut")
    assert finished_part(open_folder(str(folder)))[0].prompt_ids == ("corpus:0",)
    with pytest.raises(InputError, match=r"settings\.max_new_tokens: 9 -> 10; use the same ones to resume"):
        logged(folder, **{**settings, "settings": {"max_new_tokens": 10}})
    again, counters = logged(folder, **settings)
    for number in range(1, 4):
        feed(again, [f"{number}"], number)  # the engine counts requests from 0 again, under other names
    again.close()
    traces = open_traces(folder, verify=True)
    assert traces.prompt_ids == tuple(f"corpus:{number}" for number in range(4))
    assert counters.get("log_requests") == 3
    reference, _ = logged(tmp_path / "whole", **settings)
    for number in range(4):
        feed(reference, [f"{number}"], number)
    reference.close()
    expected = open_traces(tmp_path / "whole", verify=True)
    for name in ("prompt", "token", "kl", "position"):
        np.testing.assert_array_equal(traces.column(name), expected.column(name))


def test_a_corpus_waits_for_the_writer_and_drops_nothing(tmp_path):
    log, counters = logged(tmp_path / "t", queue=1, wait=True)
    step, rows, outcome = step_of([f"r{n}" for n in range(8)])
    log.take(step, rows, outcome, rows.verifier, range(8))
    log.close()
    assert len(open_traces(tmp_path / "t").prompt_ids) == 8
    assert counters.get("log_dropped") == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"prefixes": "reference"}, "the engine logs what it emits; use --prefixes cascade"),
        ({"teacher": "t"}, "the engine runs the pair alone"),
        ({"hidden": "drafter"}, "use none or both"),
    ],
)
def test_what_the_engine_cannot_collect_is_refused_by_name(tmp_path, settings, line):
    from deferral_train.collecting import CollectConfig
    from deferral_train.serving.offline import collect_with_engine

    given = {
        "drafter": "d",
        "verifier": "v",
        "prompts": "p",
        "prefixes": "cascade",
        "rule": "lossless",
        **settings,
    }
    if given["prefixes"] != "cascade":
        del given["rule"]
    with pytest.raises(InputError, match=line):
        collect_with_engine(CollectConfig(**given), str(tmp_path / "t"), [])


@pytest.mark.engine
def test_a_corpus_goes_through_the_engine_by_the_collect_command(tmp_path, capsys):
    from deferral_train.cli import main

    pair = save_pair(tmp_path / "pair")
    lines = [" ".join(f"w{token - 4}" for token in row) for row in prompts(20, seed=4)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "more.txt").write_text("w5 w6 w7\n")
    words = f"collect --engine vllm --drafter {pair / 'drafter'} --verifier {pair / 'verifier'}"
    words += (
        f" --prompts {tmp_path / 'prompts.txt'} --prefixes cascade --rule opt:alpha=0.2 --num-draft-tokens 3"
    )
    words += f" --max-new-tokens 20 --log-top-k 4 --dtype float32 --device cpu --out {tmp_path / 'traces'}"
    assert (
        main([*words.split(), "--limit", "8"]) == 0
    )  # as an interrupted run, whose shards hold eight prompts
    first = open_traces(tmp_path / "traces", verify=True)
    began, rows = first.prompt_ids, len(first)
    assert 5 < len(began) <= 8
    assert main(words.split()) == 0
    traces = open_traces(tmp_path / "traces", verify=True)
    assert "prompts in" in capsys.readouterr().out
    assert 15 < len(traces.prompt_ids) <= 20
    assert traces.prompt_ids[: len(began)] == began  # what was there is untouched, the others follow
    np.testing.assert_array_equal(traces.column("token")[:rows], first.column("token"))
    assert main([*words.split(), "--max-new-tokens", "9"]) == 2
    assert "collected with other settings: max_new_tokens: 20 -> 9; use" in capsys.readouterr().err
    assert main([*words.split(), "--prompts", str(tmp_path / "more.txt")]) == 2
    assert "collected with other settings: contents: " in capsys.readouterr().err
    assert all(name.startswith("prompts:") for name in traces.prompt_ids)  # the corpus' own ids
    assert traces.column("draft_position").max() == 2
    assert len(traces) > 100


def test_the_byte_limit_ends_logging_and_the_folder_stays_readable(tmp_path):
    log, counters = logged(tmp_path / "t", max_bytes=25_000, rows_per_shard=8)
    for number in range(40):
        step, rows, outcome = step_of([f"r{number}-{n}" for n in range(4)], number)
        log.take(step, rows, outcome, rows.verifier, range(4))
        log.finished(step.names)
    log.close()
    traces = open_traces(tmp_path / "t", verify=True)
    assert 0 < traces.bytes <= 25_000
    assert traces.bytes == counters.get("log_bytes")
    assert counters.get("log_dropped") > 0


def test_a_fault_of_the_writer_is_counted_and_touches_nobody(tmp_path):
    log, counters = logged(tmp_path / "t")
    step, rows, outcome = step_of(["a", "b"])
    rows.drafter[0, 0, 3] = torch.nan
    log.take(step, rows, outcome, rows.verifier, range(2))
    log.finished(["a", "b"])
    log.close()
    assert counters.get("log_faults") == 1
    assert open_traces(tmp_path / "t").prompt_ids == ("b",)
    broken: Outcome | None = None
    with pytest.raises(AttributeError):  # what Seam._log catches and counts
        log.take(step, rows, broken, rows.verifier, range(2))


def test_a_prompt_that_cannot_be_written_touches_no_request(tmp_path):
    log, counters = logged(tmp_path / "t", text=True)
    (tmp_path / "t" / "prompts.jsonl").mkdir()
    params = SimpleNamespace(temperature=0.0, extra_args=None)
    new = SimpleNamespace(req_id="a", sampling_params=params, prompt_token_ids=[1, 2], prompt_len=2)
    config = ServingConfig(rule="opt:alpha=0.2", log=log.settings)
    seam = Seam(None, config, config.make_rule(), [], counters, log, 0)
    seam.admit(new)
    assert seam.requests["a"].logged
    assert counters.get("log_faults") == 1
    seam.close()


def test_a_folder_with_traces_is_not_written_over(tmp_path):
    from deferral_train.serving.checks import _check_log

    log, _ = logged(tmp_path / "t")
    log.close()
    config = ServingConfig(rule="opt", log=LogConfig(str(tmp_path / "t")))
    with pytest.raises(InputError, match="holds traces already; name a new one"):
        _check_log(config, SimpleNamespace(method="draft_model", draft_sample_method="probabilistic"))
    with pytest.raises(InputError, match="traces need the drafter's distribution"):
        _check_log(config, SimpleNamespace(method="draft_model", draft_sample_method="greedy"))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("runner", "count"),
    [
        pytest.param("V1", 300, marks=pytest.mark.timeout(900)),
        pytest.param("V2", 30, marks=[pytest.mark.v2, pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_from_traffic_to_traces_to_a_head_that_the_engine_serves(tmp_path, runner, count):
    """Lossless traffic is logged, a head is fitted on it, shadowed, and served: three engines."""
    from deferral_train.heads import DeferralHead
    from deferral_train.heads.rules import learned_rule
    from deferral_train.training.config import FitConfig
    from deferral_train.training.fit import fit

    pair = save_pair(tmp_path / "pair")
    asked = prompts(count, seed=21)
    log = {"folder": str(tmp_path / "traces"), "fraction": 1.0, "hidden": True, "top_k": 4, "queue": 100_000}
    engine = start(pair, {"log": log})
    try:
        said = generate(engine, asked, temperature=1.0)
        found = counts(seam_of(engine))
        said += generate(
            engine, asked[: count // 5]
        )  # greedily: the engine's own sampler decides, and is looked upon
        after = counts(seam_of(engine))
    finally:
        stop(engine)
    traces = open_traces(tmp_path / "traces", verify=True)
    assert after["engine_steps"] > 0
    assert (after["steps"], after["log_dropped"], after["log_faults"]) == (found["steps"], 0, 0)
    # V2 leaves rows without a rule to the engine, sampled ones too.
    assert (found["steps"] > 0) == (runner == "V1")
    names = traces.manifest.prompt_ids
    greedy = [number for number, name in enumerate(names) if int(name.split("-")[0]) >= len(asked)]
    assert len(greedy) > count // 6
    sampled = [number for number in range(len(names)) if number not in greedy]
    if runner == "V1":
        assert np.isin(traces.prompt_of_row, sampled).sum() == found["accepted"] + found["rejected"]
    check_rows(traces, pair, asked + asked[: count // 5], said, sampled[:12])
    check_rows(traces, pair, asked + asked[: count // 5], said, greedy[:12])

    features = ("drafter_max:logit", "verifier_max:logit", "verifier_at_drafter_argmax", "tv")
    config = FitConfig(
        train=str(tmp_path / "traces"), truth="verifier", features=features, hidden=(8,), epochs=4
    )
    head = fit(config, tmp_path / "fit").head
    head.metadata["alpha"] = 0.02
    DeferralHead.save_pretrained(head, tmp_path / "head")
    engine = start(pair, {"head": str(tmp_path / "head"), "mode": "shadow"})
    try:
        seam = seam_of(engine)
        assert not seam.requests.mismatch  # the head's pair is the served one
        generate(engine, asked, temperature=1.0)
        found = counts(seam)
        predicted, lossless = per_block(found, "shadow_"), per_block(found, "")
        assert 0 < found["head_seconds"] < found["shadow_seconds"]
        use(engine, head=str(tmp_path / "head"))
        generate(engine, asked, temperature=1.0)
        served = per_block(counts(seam), "")
        assert counts(seam)["kept"] > 0
        real = counts(seam)
        losses = [found["shadow_estimated_loss"] / found["blocks"], real["estimated_loss"] / real["blocks"]]
        print(
            f"{runner}: a block lossless {lossless}, predicted {predicted}, served {served}, its loss {losses}"
        )
        rows = prompts(8, seed=6, shortest=6, longest=6)
        said = generate(engine, rows, max_tokens=16)
    finally:
        stop(engine)
    rule = learned_rule(DeferralHead.from_pretrained(tmp_path / "head"))
    from_first = [row + text[:1] for row, text in zip(rows, said)]
    expected = loop(pair, rule, from_first, 15 + DRAFTS + 1, 0.0).sequences[:, 7:22].tolist()
    assert [text[1:] for text in said] == expected
    # Means per block and their standard errors; a false alarm at 5 of them has probability below 1e-6.
    assert abs(predicted[0] - served[0]) < 5 * (predicted[1] ** 2 + served[1] ** 2) ** 0.5, (
        predicted,
        served,
    )
    least = 3 if runner == "V1" else 0  # of few requests
    assert served[0] > lossless[0] + least * (served[1] ** 2 + lossless[1] ** 2) ** 0.5, (served, lossless)
    if runner == "V2":
        return

    # Another pair: the head is loaded, every request is served lossless, and it is said why.
    engine = start(pair, {"head": str(tmp_path / "head")}, drafter="verifier")
    try:
        seam = seam_of(engine)
        assert "drafter weights" in "; ".join(seam.requests.mismatch)
        generate(engine, asked[:4])
        assert counts(seam)["refused_pair"] == 4
        assert counts(seam)["kept"] == 0
    finally:
        stop(engine)


def test_rows_of_a_quiet_server_reach_the_folder_before_their_shard_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_log, "WAITING_SECONDS", 0.2)
    log, counters = logged(tmp_path / "t")
    step, rows, outcome = step_of([f"r{n}" for n in range(4)])
    log.take(step, rows, outcome, rows.verifier, range(4))
    log.finished(step.names[:3])
    end = time.monotonic() + 20
    while counters.get("log_requests") < 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert open_traces(tmp_path / "t", partial=True).prompt_ids == (
        "r0",
        "r1",
        "r2",
    )  # and nothing was closed
    log.finished(step.names[3:])
    log.close()
    assert open_traces(tmp_path / "t", verify=True).prompt_ids == ("r0", "r1", "r2", "r3")
    assert counters.get("log_faults") == 0
