"""The OpenAI-compatible server on loopback, in processes of its own: many users at once, and what dashboards see."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest
from engines import DRAFTS, LENGTH, prompts, save_pair

from benchmarks.vllm_server import serve
from deferral_train.traces import open_traces

pytestmark = pytest.mark.engine
REQUESTS, ABORTED = 200, 24
READY_SECONDS = 240


@contextmanager
def running(folder, deferral, **more):
    """Address of a server and its process; ended at the end. ``more``: options and environment, see `serve`."""
    pair = save_pair(folder / "pair")
    log = folder / "server.log"
    address, process = serve(
        pair, log, context=LENGTH, sequences=48, drafts=DRAFTS, deferral=deferral, **more
    )
    try:
        wait_until_ready(address, process, log)
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server with a rule and a trace log, and the log's folder; ended at the end."""
    folder = tmp_path_factory.mktemp("server")
    log = {"folder": str(folder / "traces"), "fraction": 0.5, "queue": 100_000, "rows_per_shard": 200}
    deferral = {"rule": "opt:alpha=0.2", "max_request_loss": 50.0, "dial_range": [-1, 2], "log": log}
    with running(folder, deferral) as (address, process):
        yield address, folder / "traces", process


def wait_until_ready(address, process, log):
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address + "/health", timeout=2).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
    raise AssertionError(f"no answer after {READY_SECONDS} s: {log.read_text()[-3000:]}")


def metrics(address):
    """Sums over all labels but place and reason."""
    text = urllib.request.urlopen(address + "/metrics", timeout=30).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith(("deferral:", "vllm:spec_decode", "vllm:num_requests")):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def total(found, name):
    return sum(value for key, value in found.items() if key.split("{")[0] == name)


async def ask(client, address, prompt, abort=False, **settings):
    body = {"model": "pair", "prompt": prompt, "return_token_ids": True, "ignore_eos": True, **settings}
    if not abort:
        answer = await client.post(address + "/v1/completions", json=body)
        return answer.status_code, answer.json()
    async with client.stream("POST", address + "/v1/completions", json={**body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                break  # after its first token; leaving closes the connection
    return 499, None


def kinds(number):
    """Settings of a request, by its number: rules, limits, dials, lossless, greedy and seeded sampling."""
    tokens = 8 + number % 17
    choice = number % 6
    settings = {"max_tokens": tokens, "temperature": 0.0}
    if choice == 1:
        settings["vllm_xargs"] = {"deferral_lossless": 1}
    elif choice == 2:
        settings["vllm_xargs"] = {"deferral_dial": 0.05 * (number % 5), "deferral_max_request_loss": 1.5}
    elif choice == 3:
        settings |= {"temperature": 1.0, "seed": number}
    elif choice == 4:
        settings |= {"temperature": 0.7, "seed": number, "vllm_xargs": {"deferral_lossless": 1}}
    elif choice == 5:
        settings |= {"temperature": 1.0, "top_k": 5, "seed": number, "vllm_xargs": {"deferral_dial": 1.0}}
    return settings


async def everybody(address, asked, aborted):
    import httpx

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=240, limits=limits) as client:
        calls = [
            ask(client, address, prompt, abort=number in aborted, **kinds(number))
            for number, prompt in enumerate(asked)
        ]
        return await asyncio.gather(*calls)


async def one_by_one(address, asked, numbers):
    import httpx

    async with httpx.AsyncClient(timeout=240) as client:
        return {number: await ask(client, address, asked[number], **kinds(number)) for number in numbers}


def test_two_hundred_at_once_with_mixed_settings_some_aborted(server):
    address, _, _ = server
    asked = prompts(REQUESTS, seed=33, longest=24)
    aborted = set(random.Random(5).sample(range(REQUESTS), ABORTED))
    before = metrics(address)
    answers = asyncio.run(everybody(address, asked, aborted))
    complete = [number for number in range(REQUESTS) if number not in aborted]
    texts = {}
    for number in complete:
        status, body = answers[number]
        assert status == 200, body
        choice = body["choices"][0]
        texts[number] = choice["token_ids"]
        assert choice["prompt_token_ids"] == asked[number]  # nobody got another one's answer
        assert len(choice["token_ids"]) == kinds(number)["max_tokens"] == body["usage"]["completion_tokens"]
    # A fixed text is the same alone: lossless greedy ones whatever is drafted, seeded ones by their own streams.
    checked = [number for number in complete if number % 6 in (1, 3, 4)][:36]
    alone = asyncio.run(one_by_one(address, asked, checked))
    same = [alone[number][1]["choices"][0]["token_ids"] == texts[number] for number in checked]
    assert all(same), [number for number, equal in zip(checked, same) if not equal]

    found = metrics(address)

    def count(name):
        return total(found, name) - total(before, name)

    assert count("deferral:drafted_total") == sum(
        count(f"deferral:{name}_total") for name in ("kept", "accepted", "rejected", "discarded")
    )
    assert count("deferral:kept_total") > 0
    assert count("deferral:rejected_total") > 0
    assert count("deferral:passed_by_place_total") == count("deferral:kept_total") + count(
        "deferral:accepted_total"
    )
    everyone = REQUESTS + len(checked)
    assert everyone - ABORTED <= count("deferral:requests_total") <= everyone
    assert total(found, "vllm:num_requests_running") == 0
    reasons = {
        key: value for key, value in found.items() if key.startswith("deferral:refused_total") and value
    }
    assert len(reasons) == 1, reasons  # asked for, and for no other reason
    assert 'reason="asked"' in next(iter(reasons))


def test_dashboards_see_the_plug_in_beside_the_engine(server):
    address, _, _ = server
    before = metrics(address)
    settings = {"max_tokens": 24, "temperature": 0.0}

    async def several():
        import httpx

        async with httpx.AsyncClient(timeout=120) as client:
            return [await ask(client, address, prompt, **settings) for prompt in prompts(6, seed=2)]

    assert all(status == 200 for status, _ in asyncio.run(several()))
    found = metrics(address)
    drafted, theirs = (
        total(found, name) - total(before, name)
        for name in ("deferral:drafted_total", "vllm:spec_decode_num_draft_tokens_total")
    )
    assert drafted == theirs > 0
    accepted = total(found, "vllm:spec_decode_num_accepted_tokens_total") - total(
        before, "vllm:spec_decode_num_accepted_tokens_total"
    )
    ours = sum(
        total(found, f"deferral:{n}_total") - total(before, f"deferral:{n}_total")
        for n in ("kept", "accepted")
    )
    # The engine cuts a last block at the request's length, which we do not see.
    assert 0 <= ours - accepted <= 6 * DRAFTS
    assert total(found, "deferral:verdict_seconds_total") > 0


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"deferral_speed": 1}, "deferral_speed is unknown"),
        ({"deferral_dial": 5}, "this server allows -1 to 2"),
        ({"deferral_max_request_loss": 99}, "this server allows at most 50"),
    ],
)
def test_a_wish_that_the_server_does_not_grant_is_a_client_error(server, extra, line):
    address, _, _ = server

    async def once():
        import httpx

        async with httpx.AsyncClient(timeout=60) as client:
            return await ask(client, address, [5, 6], max_tokens=4, vllm_xargs=extra)

    status, body = asyncio.run(once())
    assert status == 400
    assert line in json.dumps(body)


def test_the_log_of_live_traffic_is_whole_after_the_server_ended(server):
    address, folder, process = server
    logged = total(metrics(address), "deferral:log_requests_total")
    process.terminate()
    process.wait(60)
    traces = open_traces(folder, verify=True)
    share = len(traces.prompt_ids) / (REQUESTS + 36 + 6)
    assert len(traces.prompt_ids) >= logged > 0
    assert 0.3 < share < 0.7
    assert traces.manifest.prefixes == "cascade:opt:alpha=0.2"
    assert not (folder / "prompts.jsonl").exists()


def test_a_log_that_cannot_be_written_and_a_full_queue_touch_no_request(tmp_path):
    log = {"folder": str(tmp_path / "traces"), "fraction": 1.0, "queue": 1, "rows_per_shard": 1}
    with running(tmp_path, {"rule": "opt:alpha=0.2", "log": log}) as (address, process):
        shutil.rmtree(tmp_path / "traces")
        (tmp_path / "traces").write_text("a file where the folder was")
        asked = prompts(40, seed=5)
        answers = asyncio.run(everybody(address, asked, aborted=set()))
        found = metrics(address)
        assert process.poll() is None
    for number, (status, body) in enumerate(answers):
        assert status == 200, body
        assert len(body["choices"][0]["token_ids"]) == kinds(number)["max_tokens"]
    assert total(found, "deferral:log_dropped_total") > 0
    assert total(found, "deferral:log_faults_total") > 0
    assert total(found, "deferral:log_rows_total") == 0
    assert "requests are not affected" in (tmp_path / "server.log").read_text()
