"""``decode`` with the engine in the loop's place: the same texts, origins and counts, and what stands beside them."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from engines import looking_up, prompts, save_pair

from deferral_train.cli import main
from deferral_train.decoding.decode import decode
from deferral_train.decoding.outputs import read_lines
from deferral_train.decoding.pair import load_pair
from deferral_train.decoding.settings import DecodeConfig, Settings
from deferral_train.evaluation.evidence import read_evidence
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.prompts import read_prompts
from deferral_train.report.page import write_report
from deferral_train.serving import engine_pair
from deferral_train.serving.engine_pair import EnginePair
from deferral_train.serving.running import EngineSettings

pytestmark = pytest.mark.engine
TOKENS, DRAFTS, END = 24, 4, 1  # END: of a text, an id
RULES = ("lossless", "opt:alpha=0.2", "token_v3:alpha=0.5")
BEHIND_AN_END = (
    "drafted",
    "discarded",
    "drafter_calls",
)  # the loop does not count what it drafted behind an end


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def questions(pair):
    path = pair / "prompts.jsonl"
    with open(path, "w") as file:
        for row in prompts(24, seed=5, shortest=6):
            words = [f"w{token - 4}" for token in row]
            file.write(json.dumps({"prompt": " ".join(words), "reference": " ".join(words[::-1])}) + "\n")
    return path


def words(pair, questions, out, *more):
    given = f"decode --drafter {pair / 'drafter'} --verifier {pair / 'verifier'} --prompts {questions} --out {out}"
    given += f" --device cpu --dtype float32 --max_new_tokens {TOKENS} --num_draft_tokens {DRAFTS}"
    return [*given.split(), *more]


def rows_of(folder):
    return {(row["rule"], row["id"]): row for row in read_lines(folder / "outputs.jsonl")}


def check_same(loop, engine):
    """Every row of the loop is in the engine's outputs, token for token and count for count."""
    for key, ours in loop.items():
        theirs = engine[key]
        assert theirs["tokens"] == ours["tokens"], key
        assert theirs["origin"] == ours["origin"], key
        more = {name: theirs["counts"][name] - count for name, count in ours["counts"].items()}
        behind = more["discarded"]
        assert behind >= 0
        assert more == {name: behind if name in BEHIND_AN_END else 0 for name in more}, key


@pytest.fixture(scope="module")
def both(pair, questions, tmp_path_factory):
    """A run folder with the loop's outputs and the engine's, of every kind of rule, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    looking_up(pair, "gap", folder / "head")
    rules = ["--rules", *RULES, "verifier_only", "drafter_only", f"learned:head={folder / 'head'},alpha=0.0"]
    assert (
        main(words(pair, questions, folder / "decode", *rules, "--blocks", "served", "--log_tokens", "3"))
        == 0
    )
    more = ["--engine", "vllm", "--baselines", "no_speculation", "lossless", "block", "fly"]
    assert main(words(pair, questions, folder / "engine", *rules, *more)) == 0
    return folder


def test_texts_origins_and_counts_are_those_of_the_loop(both):
    loop, engine = rows_of(both / "decode"), rows_of(both / "engine")
    assert len(loop) == 24 * 6
    check_same(loop, engine)
    kinds = {
        label: {tuple(row["tokens"]) for (rule, _), row in loop.items() if rule == label} for label, _ in loop
    }
    assert (
        kinds["opt:alpha=0.2"] != kinds["lossless"] != kinds["token_v3:alpha=0.5"]
    )  # the rules do something
    assert any(len(row["tokens"]) < TOKENS for row in loop.values())  # and some texts end


def test_what_vllm_does_by_itself_stands_in_the_same_table(both):
    engine = rows_of(both / "engine")
    summary = json.loads((both / "engine" / "summary.json").read_text())
    for own, ours in (("vllm:no_speculation", "verifier_only"), ("vllm:lossless", "lossless")):
        for (label, prompt), row in engine.items():
            if label == own:
                assert {**row, "rule": ours} == {**engine[ours, prompt]}
        assert summary["rules"][own]["counts"] == summary["rules"][ours]["counts"]
    assert "ignores rejection_sample_method 'block'; V2 has it" in summary["not_run"]["vllm:block"]
    assert "has no rejection_sample_method 'fly'" in summary["not_run"]["vllm:fly"]
    assert {"vllm:block", "vllm:fly"}.isdisjoint(summary["rules"])


def test_what_ran_is_recorded_and_a_certificate_would_name_it(both):
    import vllm

    summary = json.loads((both / "engine" / "summary.json").read_text())
    assert {rule["ran"]["runner"] for rule in summary["rules"].values()} == {"V1"}
    assert read_evidence(both / "engine").conditions["engine"] == f"vllm {vllm.__version__}"
    assert json.loads((both / "engine" / "run.json").read_text())["conditions"]["runner"] == "V1"
    loop = json.loads((both / "decode" / "summary.json").read_text())
    assert loop["models"] == summary["models"]
    for label, rule in loop["rules"].items():
        assert summary["rules"][label]["quality"] == rule["quality"]


def test_a_finished_run_is_not_decoded_again(both, pair, questions, capsys):
    before = (both / "engine" / "outputs.jsonl").read_bytes()
    rules = ["--rules", *RULES, "verifier_only", "drafter_only", f"learned:head={both / 'head'},alpha=0.0"]
    more = ["--engine", "vllm", "--baselines", "no_speculation", "lossless", "block", "fly"]
    assert main(words(pair, questions, both / "engine", *rules, *more)) == 0
    assert (both / "engine" / "outputs.jsonl").read_bytes() == before
    said = capsys.readouterr().out
    assert "vllm:block" in said
    assert "not run: the V1 runner" in said
    assert "(V1 runner, cpu, float32)" in said
    # The loop's outputs are not the engine's: the same folder is refused.
    assert main(words(pair, questions, both / "engine", *rules)) == 2


@pytest.fixture(scope="module")
def opened(pair):
    """Decodes with one engine: settings of the decoding, and the folder."""
    settings = EngineSettings(
        str(pair / "verifier"), str(pair / "drafter"), num_draft_tokens=DRAFTS, device="cpu", dtype="float32"
    )
    options = Settings(num_draft_tokens=DRAFTS, max_new_tokens=TOKENS, batch_size=4, blocks="served")
    with EnginePair(settings, [rule_from_spec(spec) for spec in RULES], options) as made:
        yield made, options


def test_a_killed_run_goes_on_where_it_was(opened, questions, tmp_path, monkeypatch):
    pair, options = opened
    monkeypatch.setattr(engine_pair, "HANDED_OVER", 2)  # three times eight prompts
    given, rules = read_prompts(str(questions)), {spec: rule_from_spec(spec) for spec in RULES}
    config = DecodeConfig(options)
    decode(pair, given, rules, config, tmp_path / "whole")
    real, calls = pair.decode_batch, []

    def killed(*arguments, **named):
        if len(calls) == 3 + 4:  # after warming up, in the middle
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(pair, "decode_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        decode(pair, given, rules, config, tmp_path / "killed")
    assert len(list(read_lines(tmp_path / "killed" / "batches.jsonl"))) == 4
    monkeypatch.setattr(pair, "decode_batch", real)
    again = decode(pair, given, rules, config, tmp_path / "killed")
    assert len(list(read_lines(tmp_path / "killed" / "batches.jsonl"))) == 9
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert again["run"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["run"]


@pytest.mark.parametrize("limit", [2.0, 0.0])
def test_limits_on_the_loss_are_the_loops(opened, pair, questions, tmp_path, limit):
    engine, options = opened
    given, rules = read_prompts(str(questions)), {spec: rule_from_spec(spec) for spec in RULES}
    config = DecodeConfig(replace(options, max_request_loss=limit))
    decode(engine, given, rules, config, tmp_path / "engine")
    models = load_pair(str(pair / "drafter"), str(pair / "verifier"), "cpu", "float32")
    decode(models, given, rules, config, tmp_path / "decode")
    loop, theirs = rows_of(tmp_path / "decode"), rows_of(tmp_path / "engine")
    check_same(loop, theirs)
    for key, row in loop.items():
        ended = row["tokens"][-1] == END  # the engine charges what was kept behind an end, too
        assert ended or theirs[key]["spent"] == pytest.approx(row["spent"], abs=1e-4)
        assert theirs[key]["spent"] <= limit
    assert (sum(row["spent"] for row in loop.values()) > 0) == (limit > 0)


def test_a_text_ends_with_the_first_token_that_completes_a_stop_string(opened, questions, tmp_path):
    engine, options = opened
    given, rules = read_prompts(str(questions)), {spec: rule_from_spec(spec) for spec in RULES}
    decode(engine, given, rules, DecodeConfig(options), tmp_path / "whole")
    strings = ("w7", "w1 w")
    decode(engine, given, rules, DecodeConfig(replace(options, stop_strings=strings)), tmp_path / "stopped")
    stopped, cut = rows_of(tmp_path / "stopped"), 0
    for key, row in rows_of(tmp_path / "whole").items():
        texts = [engine.tokenizer.decode(row["tokens"][:end]) for end in range(1, len(row["tokens"]) + 1)]
        ends = [place + 1 for place, text in enumerate(texts) if any(string in text for string in strings)]
        assert stopped[key]["tokens"] == row["tokens"][: min(ends, default=len(texts))]
        assert stopped[key]["counts"]["emitted"] == len(stopped[key]["tokens"])
        cut += bool(ends)
    assert 10 < cut < 72


def test_a_seed_fixes_a_sampled_run(opened, questions, tmp_path):
    engine, options = opened
    given, rules = read_prompts(str(questions)), {spec: rule_from_spec(spec) for spec in RULES}
    texts = []
    for number, seed in enumerate((3, 3, 4)):
        config = DecodeConfig(
            replace(options, temperature=1.0, top_k=20, seed=seed), repetitions=2 - (number > 0)
        )
        decode(engine, given, rules, config, tmp_path / str(number))
        rows = read_lines(tmp_path / str(number) / "outputs.jsonl")
        texts.append({(row["rule"], row["repetition"], row["id"]): row["tokens"] for row in rows})
    first = {key: tokens for key, tokens in texts[0].items() if key[1] == 0}
    assert first == texts[1] != texts[2]
    assert any(tokens != texts[0][rule, 1, name] for (rule, _, name), tokens in first.items())


def test_what_the_engine_cannot_decode_is_one_line(pair, questions, tmp_path, capsys):
    def refused(*more):
        assert main(words(pair, questions, tmp_path / "out", "--engine", "vllm", *more)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "device='cuda': this vLLM runs on cpu; use auto or cpu" in refused("--device", "cuda")
    assert "exceed the context of 256" in refused("--max_new_tokens", "250")
    assert "rule fly waits for 6 drafted tokens behind one" in refused(
        "--rules", "fly:threshold=0.3,window=6"
    )
    damaged = tmp_path / "elsewhere"
    damaged.mkdir()
    assert "holds no config.json" in refused("--verifier", str(damaged))
    path = pair / "verifier" / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "no_repeat_ngram_size": 3}))
    try:
        assert "asks for no_repeat_ngram_size=3" in refused()
    finally:
        path.write_text(before)
    assert not (tmp_path / "out" / "outputs.jsonl").exists()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_one_report_shows_both(both):
    page = write_report(both).read_text()
    section = page[page.index('<section id="engine">') : page.index('<section id="tokens">')]
    assert "V1 runner, cpu, float32" in section
    assert section.count("<td>24 of 24</td><td>0</td>") == 6
    assert "not run: the V1 runner" in section
    assert "Texts that differ" not in section


@pytest.mark.v2
def test_the_v2_runner_writes_the_loops_text_and_has_block_verification(pair, questions, tmp_path):
    rules = ["--rules", "lossless", "opt:alpha=0.2", "--limit", "8"]
    assert main(words(pair, questions, tmp_path / "decode", *rules, "--blocks", "served")) == 0
    more = ["--engine", "vllm", "--baselines", "block", "fly"]
    assert main(words(pair, questions, tmp_path / "engine", *rules, *more)) == 0
    loop, engine = rows_of(tmp_path / "decode"), rows_of(tmp_path / "engine")
    check_same(loop, engine)
    for (label, name), row in engine.items():
        if label == "vllm:block":  # at temperature 0 blocks are verified token by token, whatever the method
            assert {**row, "rule": "lossless"} == engine["lossless", name]
    summary = json.loads((tmp_path / "engine" / "summary.json").read_text())
    assert summary["rules"]["vllm:block"]["ran"]["runner"] == "V2"
    assert list(summary["not_run"]) == ["vllm:fly"]
