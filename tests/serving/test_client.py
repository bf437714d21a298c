"""Requests to a server: keys, retries, and one line for whatever can be wrong. The server is a stub on loopback."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_models import tiny_tokenizer

from deferral_train.cli import main
from deferral_train.decoding.outputs import read_lines
from deferral_train.errors import InputError
from deferral_train.serving import client as client_module
from deferral_train.serving.client import KEY_VARIABLE, TRIES, ServerClient

SECRET = "s3cr3t-k3y-of-mine"
MODELS = {"data": [{"id": "pair", "max_model_len": 64}]}


class Stub:
    """A server whose answers a test writes: (status, headers, body) by method and path, the last one for good."""

    def __init__(self):
        self.answers = {
            ("GET", "/v1/models"): [(200, {}, MODELS)],
            ("GET", "/version"): [(200, {}, {"version": "0.32.0"})],
        }
        self.seen = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                size = int(self.headers.get("Content-Length") or 0)
                stub.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(size)))
                planned = stub.answers.get((self.command, self.path)) or [
                    (404, {}, {"error": {"message": "no such path"}})
                ]
                status, headers, body = planned.pop(0) if len(planned) > 1 else planned[0]
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = answer  # noqa: N815 - names that the library calls

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def on_completion(self, *answers):
        self.answers["POST", "/v1/completions"] = list(answers)


@pytest.fixture
def stub(monkeypatch):
    waits = []
    monkeypatch.setattr(client_module.time, "sleep", waits.append)
    made = Stub()
    made.waits = waits
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_what_a_server_says_of_itself(stub):
    client = ServerClient(stub.address + "/v1/")
    assert (client.address, client.model, client.context, client.version) == (
        stub.address,
        "pair",
        64,
        "0.32.0",
    )
    assert all("Authorization" not in headers for _, _, headers, _ in stub.seen)


def test_the_key_comes_from_the_environment_and_is_sent_nowhere_else(stub, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    other = Stub()
    stub.on_completion((307, {"Location": other.address + "/v1/completions"}, {}))
    client = ServerClient(stub.address)
    assert {headers["Authorization"] for _, _, headers, _ in stub.seen} == {f"Bearer {SECRET}"}
    with pytest.raises(InputError, match="fails with status 307"):
        client.complete({"prompt": [1]})
    assert other.seen == []  # a redirect is not followed
    other.server.shutdown()
    stub.on_completion((401, {}, {"error": SECRET}))
    with pytest.raises(InputError, match=f"variable {KEY_VARIABLE} is not right") as refused:
        client.complete({"prompt": [1]})
    assert SECRET not in str(refused.value)


def test_a_busy_server_is_asked_again_so_many_times_and_as_it_says(stub):
    stub.on_completion((429, {"Retry-After": "3"}, {}), (503, {}, {}), (200, {}, {"choices": []}))
    client = ServerClient(stub.address)
    assert client.complete({"prompt": [1]}) == {"choices": []}
    assert stub.waits == [3.0, 1.0]
    stub.waits.clear()
    stub.on_completion((503, {"Retry-After": "9999"}, {}))
    before = len(stub.seen)
    with pytest.raises(
        InputError, match=rf"too busy {TRIES} times \(status 503\); ask for fewer at once \(batch_size\)"
    ):
        client.complete({"prompt": [1]})
    assert len(stub.seen) - before == TRIES
    assert stub.waits == [30.0] * (TRIES - 1)


def test_a_server_without_the_plug_in_is_refused(stub):
    client = ServerClient(stub.address)
    stub.on_completion((200, {}, {"choices": []}))
    with pytest.raises(
        InputError, match="has no plug-in of deferral-train in force; start it with --additional-config"
    ):
        client.check_plug_in([1])
    assert json.loads(stub.seen[-1][3])["vllm_xargs"] == {"deferral_probe": 1}
    stub.on_completion((400, {}, {"error": {"message": "deferral_probe is unknown; a request may say .."}}))
    client.check_plug_in([1])
    stub.on_completion((400, {}, {"error": {"message": "prompt is too long"}}))
    with pytest.raises(InputError, match="answers 400: prompt is too long"):
        client.check_plug_in([1])


def completion(tokens, **metrics):
    choice = {"token_ids": tokens, "finish_reason": "length"}
    return 200, {}, {"choices": [choice], "metrics": {"speculative_decoding": metrics} if metrics else None}


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (completion([5, 6, 7]), "start it with --per-request-spec-decode-metrics detailed"),
        (completion([5, -6], per_step_drafted=[4], per_step_accepted=[0]), "gives no token ids"),
        (completion("abc", per_step_drafted=[4], per_step_accepted=[0]), "gives no token ids"),
        ((200, {}, {"choices": []}), "gives no token ids; decode needs a server of vLLM 0.32"),
        ((500, {}, b"<html>"), "fails with status 500: <html>; see the server's log"),
    ],
)
def test_answers_that_do_not_say_enough(stub, tmp_path, capsys, answer, line):
    tiny_tokenizer().save_pretrained(tmp_path / "verifier")
    (tmp_path / "p.txt").write_text("w1 w2\n")
    stub.on_completion((400, {}, {"error": {"message": "deferral_probe is unknown"}}), answer)
    given = (
        f"decode --server {stub.address} --verifier {tmp_path / 'verifier'} --prompts {tmp_path / 'p.txt'}"
    )
    assert main([*given.split(), "--out", str(tmp_path / "out"), "--max_new_tokens", "16"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert line in said[-1]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_blocks_are_read_off_an_answer(stub, tmp_path, capsys):
    """First token undrafted, blocks of 4 with 2, 4 and 1 accepted, the last one cut by the length."""
    tiny_tokenizer().save_pretrained(tmp_path / "verifier")
    (tmp_path / "p.txt").write_text("w1 w2\n")
    tokens = list(range(10, 20))
    told = completion(tokens, per_step_drafted=[4, 4, 4], per_step_accepted=[2, 4, 1])
    stub.on_completion((400, {}, {"error": {"message": "deferral_probe is unknown"}}), told)
    given = (
        f"decode --server {stub.address} --verifier {tmp_path / 'verifier'} --prompts {tmp_path / 'p.txt'}"
    )
    assert (
        main(
            [
                *given.split(),
                "--out",
                str(tmp_path / "out"),
                "--num_draft_tokens",
                "4",
                "--max_new_tokens",
                "10",
            ]
        )
        == 0
    )
    bodies = [json.loads(body) for method, _, _, body in stub.seen if method == "POST"]
    assert [body.get("vllm_xargs") for body in bodies[1:]] == [
        {"deferral_lossless": 1},
        None,
    ] * 2  # warming up, too
    lossless, server = read_lines(tmp_path / "out" / "outputs.jsonl")
    assert (lossless["rule"], server["rule"]) == ("lossless", "server")
    assert server["tokens"] == tokens
    assert server["origin"] == [4, 2, 2, 3, 2, 2, 2, 2, 4, 2]
    assert server["counts"] == {
        "drafted": 12, "kept": 0, "accepted": 7, "unverified": 0, "rejected": 1, "discarded": 4, "resampled": 1,
        "bonus": 2, "deferred": 0, "decided": 8, "verifier_calls": 4, "drafter_calls": 12, "emitted": 10,
    }  # fmt: skip
    assert lossless["counts"] == {**server["counts"], "deferred": 8}
    assert " - " in capsys.readouterr().out.splitlines()[2]  # nobody says what the rule deferred


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://127.0.0.1:9", "cannot be reached .*start it with `vllm serve`"),
        ("ftp://127.0.0.1:9", "is no address; write http://HOST:PORT"),
        ("http://127.0.0.1:port", "is no address"),
        ("http://me:pass@127.0.0.1:9", f"put the key into the variable {KEY_VARIABLE}"),
    ],
)
def test_an_address_that_is_none_or_where_nobody_listens(url, line):
    with pytest.raises(InputError, match=line) as refused:
        ServerClient(url)
    assert "pass@" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"<html>", "does not answer as an OpenAI-compatible server"),
        (b"[1]", "does not answer as an OpenAI-compatible server"),
        ({"data": []}, "serves no model"),
        ({"data": [{"id": 3}, "pair"]}, "serves no model"),
    ],
)
def test_answers_of_something_else(stub, body, line):
    stub.answers["GET", "/v1/models"] = [(200, {}, body)]
    with pytest.raises(InputError, match=line):
        ServerClient(stub.address)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--engine vllm --server http://h:1", "a server is an engine of its own; leave one of them out"),
        ("--engine vlm", "engine is 'vlm'; use one of transformers, vllm"),
        ("--baselines block", r"baselines is \['block'\], which engine transformers does not take"),
        ("--kv_gib 2", "kv_gib is 2.0, which engine transformers does not take"),
        ("--engine vllm --device_map auto", "device_map is 'auto', which engine vllm does not take"),
        ("--server http://h:1", "drafter is 'd', which --server does not take"),
        (
            "--server http://h:1 --drafter= --dtype float16",
            "dtype is 'float16', which --server does not take",
        ),
        (
            "--server http://h:1 --drafter= --rules opt:alpha=0.2",
            "the rule is the server's; use lossless, server or",
        ),
        ("--server http://h:1 --drafter= --rules server:dial=high", "use lossless, server or server:dial=X"),
        ("--server http://h:1 --drafter= --metrics log_likelihood", "and --server loads none"),
        ("--drafter=", "drafter is not given; add --drafter"),
        (
            "--engine vllm --execution token",
            "execution is 'token' with engine vllm: the engine verifies blocks",
        ),
        ("--engine vllm --bonus exact", "bonus is 'exact' with engine vllm"),
        ("--engine vllm --verification block", "use token, and vLLM's own by --baselines block"),
        (
            "--engine vllm --log_tokens 3",
            "log_tokens is 3 with engine vllm: the engine hands no candidates over",
        ),
        (
            "--engine vllm --stop confidence",
            "stop is given with engine vllm: the engine drafts blocks of one length",
        ),
        ("--engine vllm --drafting max_gram:tokens=4", "drafting is given with engine vllm"),
        ("--engine vllm --baselines blok", "'blok' is unknown; known: no_speculation, lossless, block, fly"),
        ("--engine vllm --baselines fly fly", "the same one is given twice"),
    ],
)
def test_the_command_refuses_what_the_engine_or_server_has_not_in_one_line(tmp_path, capsys, words, line):
    import re

    (tmp_path / "p.txt").write_text("w1 w2\n")
    given = f"decode --drafter d --verifier v --prompts {tmp_path / 'p.txt'} --out {tmp_path / 'out'} {words}"
    assert main(given.split()) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(line, said), said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
