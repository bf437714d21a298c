"""The plug-in over HTTP: vLLM's own serving benchmark against four servers on loopback, by concurrency.

A part of vllm_serving.py. The servers (no speculation, the plug-in lossless, with the best plug-in rule, with a head)
stand at the same time, and are asked in turn, round by round, with `vllm.benchmarks.serve`, which is what
`vllm bench serve` runs. Greedy, prompts of code, every request to its full length. Rule and head stand at the
settings that accept most, of a few, among those whose own estimated loss on other prompts is at most `MOST_LOSS` a
token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.vllm_engines import CONCURRENCY, CONTEXT, DRAFTS, ask, prompts_of, start, stop, use
from benchmarks.vllm_server import serve

REQUESTS = {1: 8, 8: 32, 32: 96}
CANDIDATES = [
    f"{name}:alpha={alpha:g}"
    for name, alphas in (
        ("chow", (0.3, 0.5, 0.7)),
        ("opt", (-0.1, 0.0, 0.05, 0.1, 0.2)),
        ("token_v1", (0.05, 0.2, 0.4)),
        ("token_v3", (0.2, 0.5, 0.8)),
    )
    for alpha in alphas
]
ALPHAS = (0.05, 0.1, 0.12, 0.14, 0.16, 0.2, 0.3)  # of the head
MOST_LOSS = 0.02
METRICS = (
    "request_throughput",
    "output_throughput",
    *(f"{which}_{name}_ms" for name in ("ttft", "tpot", "itl") for which in ("mean", "median", "p99")),
    "spec_decode_acceptance_length",
)
READY_SECONDS = 300


def http_table(pair: Path, head: str, scratch: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Medians over rounds of what the engine's benchmark reports, by mode and concurrency."""
    chosen, tried = chosen_settings(pair, head, tokens)
    modes: dict[str, dict[str, Any] | None] = {
        "no speculation": None,
        "lossless": {"rule": "lossless"},
        **chosen,
    }
    data = scratch / "prompts.jsonl"
    write_prompts(pair, data, 4 * max(CONCURRENCY), tokens)
    servers: dict[str, tuple[str, subprocess.Popen]] = {}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    try:
        for name, deferral in modes.items():
            servers[name] = serve(
                pair,
                scratch / f"server-{len(servers)}.log",
                context=CONTEXT,
                sequences=max(CONCURRENCY),
                drafts=DRAFTS,
                deferral=deferral,
                options=["--no-enable-prefix-caching"],
                environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},  # bound, all would share the first core
            )
        for name, (address, process) in servers.items():
            wait(address, process, name)
        for concurrency in CONCURRENCY:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
            for _ in range(rounds + 1):
                for name, (address, _process) in servers.items():
                    runs[name].append(bench(address, pair, data, concurrency, tokens, scratch))
            found[str(concurrency)] = {name: middle(each[1:]) for name, each in runs.items()}  # type: ignore[misc]
    finally:
        for _address, process in servers.values():
            process.terminate()
        for _address, process in servers.values():
            process.wait(60)
    return {
        "tried": tried,
        "most_loss": MOST_LOSS,
        "requests": {str(n): REQUESTS[n] for n in REQUESTS},
        "table": found,
    }


def chosen_settings(
    pair: Path, head: str, tokens: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """The plug-in's settings of both modes, and what every candidate gave on prompts that are not asked later."""
    candidates: dict[str, dict[str, Any]] = {f"rule {spec}": {"rule": spec} for spec in CANDIDATES}
    candidates |= {f"head alpha={alpha:g}": {"head": head, "alpha": alpha} for alpha in ALPHAS}
    llm, rows, tried = start(pair, {"rule": "lossless"}), prompts_of(pair, 160)[128:], {}
    for name, settings in candidates.items():
        counters = use(llm, settings).counters
        ask(llm, rows, tokens)
        blocks, stand = counters.get("blocks"), counters.get("kept") + counters.get("accepted")
        tried[name] = {
            "acceptance_length": 1 + stand / blocks,
            "loss_per_token": counters.get("estimated_loss") / (blocks + stand),
        }
    stop(llm)
    found = {}
    for kind in ("rule", "head"):
        names = [name for name in candidates if name.startswith(kind)]
        allowed = [name for name in names if tried[name]["loss_per_token"] <= MOST_LOSS] or names
        best = max(allowed, key=lambda name: tried[name]["acceptance_length"])
        found[best] = candidates[best]
    return found, tried


def write_prompts(pair: Path, path: Path, count: int, tokens: int) -> None:
    """The prompts as text, in the form that the engine's benchmark reads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "verifier")
    with open(path, "w", encoding="utf-8") as file:
        for row in prompts_of(pair, count):
            file.write(json.dumps({"prompt": tokenizer.decode(row), "output_tokens": tokens}) + "\n")


def wait(address: str, process: subprocess.Popen, name: str) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address + "/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server of {name!r} did not start within {READY_SECONDS} s")


def bench(
    address: str, pair: Path, data: Path, concurrency: int, tokens: int, scratch: Path
) -> dict[str, float]:
    """One run of the engine's own benchmark."""
    from vllm.benchmarks.serve import add_cli_args, main

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    words = f"--base-url {address} --endpoint /v1/completions --model pair --tokenizer {pair / 'verifier'}"
    words += f" --dataset-name custom --dataset-path {data} --custom-output-len {tokens} --skip-chat-template"
    words += (
        f" --max-concurrency {concurrency} --num-prompts {REQUESTS[concurrency]} --temperature 0 --ignore-eos"
    )
    words += " --percentile-metrics ttft,tpot,itl --metric-percentiles 99 --disable-tqdm"
    result = main(parser.parse_args(words.split()))
    if result["completed"] != REQUESTS[concurrency]:
        raise RuntimeError(f"{result['completed']} of {REQUESTS[concurrency]} requests were answered")
    return {name: float(result[name]) for name in METRICS if result.get(name) is not None}


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds, and the range of the throughput."""
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    rates = [run["output_throughput"] for run in runs]
    return {**found, "output_throughput_low": min(rates), "output_throughput_high": max(rates)}


def lines(found: dict[str, Any]) -> list[str]:
    """The part as a table; length is tokens per verifier call."""
    said = [
        "| at once | mode | requests/s | tokens/s (lowest, highest) | TTFT mean, median, P99 ms | TPOT | ITL | len |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for concurrency, modes in found["table"].items():
        for name, row in modes.items():
            times = [
                ", ".join(f"{row[f'{which}_{part}_ms']:.1f}" for which in ("mean", "median", "p99"))
                for part in ("ttft", "tpot", "itl")
            ]
            length = row.get("spec_decode_acceptance_length")
            said.append(
                f"| {concurrency} | {name} | {row['request_throughput']:.2f} | {row['output_throughput']:.0f} "
                f"({row['output_throughput_low']:.0f}, {row['output_throughput_high']:.0f}) | {' | '.join(times)} | "
                f"{'-' if length is None else f'{length:.2f}'} |"
            )
    return said
