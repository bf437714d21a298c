"""``decode --server`` against a real server in a process of its own."""

from __future__ import annotations

import json

import pytest
from engines import prompts
from test_server import running

from deferral_train.cli import main
from deferral_train.decoding.outputs import read_lines
from deferral_train.serving.client import KEY_VARIABLE

pytestmark = pytest.mark.engine
TOKENS, DRAFTS = 20, 4
SECRET = "a-key-that-nobody-may-read"
STATISTICS = ("--per-request-spec-decode-metrics", "detailed")


def words(folder, out, *more):
    given = (
        f"decode --verifier {folder / 'pair' / 'verifier'} --prompts {folder / 'prompts.jsonl'} --out {out}"
    )
    given += f" --max_new_tokens {TOKENS} --num_draft_tokens {DRAFTS}"
    return [*given.split(), *more]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder and address of a server with a rule and a key."""
    folder = tmp_path_factory.mktemp("server")
    deferral = {"rule": "opt:alpha=0.2", "dial_range": [-1, 1]}
    with running(folder, deferral, options=STATISTICS, environment={"VLLM_API_KEY": SECRET}) as (address, _):
        with open(folder / "prompts.jsonl", "w") as file:
            for row in prompts(16, seed=9, shortest=5):
                text = " ".join(f"w{token - 4}" for token in row)
                file.write(json.dumps({"prompt": text, "reference": text}) + "\n")
        yield folder, address


def rows_of(folder, label):
    return {row["id"]: row for row in read_lines(folder / "outputs.jsonl") if row["rule"] == label}


def test_the_servers_rule_against_lossless_is_what_the_loop_decodes(server, tmp_path, capsys, monkeypatch):
    folder, address = server
    out = tmp_path / "out"
    rules = ["--rules", "lossless", "server", "server:dial=0.6"]
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(words(folder, out, "--server", address, *rules)) == 2
    assert f"the environment variable {KEY_VARIABLE} is not set" in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, "another")
    assert main(words(folder, out, "--server", address, *rules)) == 2
    assert f"{KEY_VARIABLE} is not right" in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    assert main(words(folder, out, "--server", address, *rules)) == 0
    said = capsys.readouterr()

    pair = ["--drafter", str(folder / "pair" / "drafter"), "--device", "cpu", "--dtype", "float32"]
    own = ["--rules", "lossless", "opt:alpha=0.2", "opt:alpha=0.6", "--blocks", "served"]
    assert main(words(folder, tmp_path / "loop", *pair, *own)) == 0
    for label, rule in (("lossless", own[1]), ("server", own[2]), ("server:dial=0.6", own[3])):
        theirs, ours = rows_of(out, label), rows_of(tmp_path / "loop", rule)
        assert len(theirs) == 16
        for name, row in theirs.items():
            assert row["tokens"] == ours[name]["tokens"]
            assert row["text"] == ours[name]["text"]
            for count in ("verifier_calls", "rejected", "resampled", "bonus", "emitted", "decided"):
                assert row["counts"][count] == ours[name]["counts"][count]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rules"]["lossless"]["deferral_rate"] == 1.0
    assert summary["rules"]["server"]["deferral_rate"] is None  # nobody says
    assert (
        summary["rules"]["server"]["mean_acceptance_length"]
        > summary["rules"]["lossless"]["mean_acceptance_length"]
    )
    assert summary["conditions"]["server"] == address
    assert "decoded by vllm 0.32" in said.out
    written = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert SECRET not in written + said.out + said.err


def test_wishes_that_the_server_does_not_grant_are_one_line(server, tmp_path, capsys, monkeypatch):
    folder, address = server
    monkeypatch.setenv(KEY_VARIABLE, SECRET)

    def refused(*more):
        assert main(words(folder, tmp_path / "out", "--server", address, *more)) == 2
        said = capsys.readouterr().err.strip().splitlines()
        return said[-1]

    assert "this server allows -1 to 1" in refused("--rules", "lossless", "server:dial=4")
    assert "exceed the context of 160" in refused("--max_new_tokens", "160")
