"""The plug-in inside vLLM: speed against the engine's own speculation, overheads, acceptance, and a table over HTTP.

    make test-vllm                                   # makes .venv-vllm
    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_serving --out OUT.json

Trains a small Llama pair first (`train-pair` on the standard library's sources; --pair FOLDER takes a finished one).
Parts: `speed` and `agreement` here, `overhead` in vllm_overhead.py, `http` in vllm_http.py. Except for `http`, all
engines live in this one process and are asked in turn, round by round, so that a busy machine is busy for all of them;
ratios are medians over rounds. Greedy decoding but for `agreement`, prompts of the same text, every request to its full
length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import flags
from benchmarks.vllm_engines import (
    CONCURRENCY,
    DRAFTS,
    ask,
    fit_head,
    paired,
    prompts_of,
    start,
    stop,
    train,
    use,
)
from deferral_train import provenance

PARTS = ("agreement", "speed", "overhead", "http")


def main() -> int:
    parser = flags(__doc__, ("cpu",), threads=None)
    parser.add_argument("--pair", type=Path, help="folder with drafter/ and verifier/; default: train one")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="tokens per request")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the verifier")
    parser.add_argument("--rules", nargs="+", default=["token_v3:alpha=0.5", "opt:alpha=0.1"])
    options = parser.parse_args()
    try:
        import vllm
    except ImportError:
        print(
            "vllm_serving: vLLM is not installed here; run it in .venv-vllm (make test-vllm)", file=sys.stderr
        )
        return 2
    result: dict[str, Any] = {"conditions": conditions(vllm.__version__, options)}
    with tempfile.TemporaryDirectory() as scratch:
        pair = options.pair or train(Path(scratch) / "pair", options.steps)
        head = str(Path(scratch) / "head")
        if {"speed", "overhead", "http"} & set(options.part):
            rows = prompts_of(pair, 288)[160:]  # none that is asked later
            fit_head(pair, Path(scratch), rows, options.tokens)
        for part in options.part:
            result[part] = run(part, pair, head, Path(scratch), options)
            print("\n".join(["", *lines_of(part, result[part])]), flush=True)
            if options.out:  # after every part: an interrupted run keeps what it has
                provenance.write_json(options.out, result)
    return 0


def run(part: str, pair: Path, head: str, scratch: Path, options: argparse.Namespace) -> Any:
    """Measure one part."""
    if part == "agreement":
        return agreement(pair, [*options.rules, "lossless"])
    if part == "speed":
        return speed(pair, head, scratch, options)
    if part == "overhead":
        from benchmarks.vllm_overhead import overhead

        return overhead(pair, head, scratch, options.rules, options.rounds)
    from benchmarks.vllm_http import http_table

    return http_table(pair, head, scratch, options.rounds, options.tokens)


def conditions(version: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers hold for; folders by their names alone."""
    record = provenance.collect()
    record["argv"] = [Path(word).name if os.sep in word else word for word in record.get("argv", [])]
    return {
        "vllm": version,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rounds": options.rounds,
        "tokens": options.tokens,
        "drafted": DRAFTS,
        "dtype": "float32",
        "provenance": record,
    }


def speed(pair: Path, head: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of every mode by concurrency, and ratios to the engine's own speculation."""
    rows = prompts_of(pair, 4 * max(CONCURRENCY))
    engines = {
        "none": start(pair, drafter=False),
        "engine": start(pair),
        "plug-in": start(pair, {"rule": "lossless"}),
    }
    modes: dict[str, tuple[Any, Callable[[], Any]]] = {
        "no speculation": (engines["none"], lambda: None),
        "engine's speculation": (engines["engine"], lambda: None),
        "plug-in lossless": (engines["plug-in"], lambda: use(engines["plug-in"], {"rule": "lossless"})),
    }
    for spec in options.rules:
        modes[spec] = (engines["plug-in"], lambda spec=spec: use(engines["plug-in"], {"rule": spec}))
    modes["head"] = (engines["plug-in"], lambda: use(engines["plug-in"], {"head": head}))
    table = {}
    for concurrency in CONCURRENCY:
        asked = rows[:concurrency]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
        texts: dict[str, list[list[int]]] = {}
        for round_number in range(options.rounds + 1):
            for name, (llm, prepare) in modes.items():
                seam = prepare()
                texts[name], wall, cpu = ask(llm, asked, options.tokens)
                if round_number:  # the first warms up
                    found[name].append({"wall": wall, "cpu": cpu, **shares(seam, wall)})
        emitted = concurrency * options.tokens
        table[str(concurrency)] = {
            name: {
                "tokens_per_second": emitted / statistics.median(run["wall"] for run in runs),
                "cpu_ms_per_token": 1e3 * statistics.median(run["cpu"] for run in runs) / emitted,
                "verdict_share": statistics.median(run["verdict"] for run in runs),
                "stands_per_block": statistics.median(run["stands"] for run in runs),
                "identical_to_verifier": texts[name] == texts["no speculation"],
                "against_engine_cpu": paired(runs, found["engine's speculation"], "cpu"),
                "against_engine_wall": paired(runs, found["engine's speculation"], "wall"),
            }
            for name, runs in found.items()
        }
        for name in ("engine's speculation", "plug-in lossless"):
            if texts[name] != texts["no speculation"]:
                raise RuntimeError(f"greedy text differs from the verifier's own: {name}")
    stop(*engines.values())
    return table


def shares(seam: Any, wall: float) -> dict[str, float]:
    """The verdict's share of wall time, and drafted tokens that stand per block; 0 where we decide nothing."""
    if seam is None:
        return {"verdict": 0.0, "stands": 0.0}
    counters = seam.counters
    stands = (counters.get("kept") + counters.get("accepted")) / max(1.0, counters.get("blocks"))
    return {"verdict": counters.get("verdict_seconds") / wall, "stands": stands}


def agreement(
    pair: Path, rules: list[str], prompts: int = 256, tokens: int = 49
) -> dict[str, list[dict[str, float]]]:
    """Share of drafted tokens that stand, by place in the block, in the engine and in this project's loop.

    Sampling at temperature 1. The loop starts from the engine's first token, which is not drafted, so that blocks begin
    at the same places; both then follow their own text.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from deferral_train import cascade_generate
    from deferral_train.heads.rules import rule_from_spec

    rows = prompts_of(pair, prompts)
    llm = start(pair, {"rule": rules[0]})
    drafter, verifier = (
        AutoModelForCausalLM.from_pretrained(pair / name).eval() for name in ("drafter", "verifier")
    )
    verifier.generation_config.eos_token_id = None
    found: dict[str, list[dict[str, float]]] = {}
    for spec in rules:
        seam = use(llm, {"rule": spec})
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
        begun = torch.tensor([row + list(out.outputs[0].token_ids)[:1] for row, out in zip(rows, outputs)])
        stats = verifier.generate(
            begun, attention_mask=torch.ones_like(begun), custom_generate=cascade_generate, drafter=drafter,
            rule=rule_from_spec(spec), num_draft_tokens=DRAFTS, max_new_tokens=tokens - 1, do_sample=True, top_k=0,
            return_dict_in_generate=True, generator=torch.Generator().manual_seed(0),
        ).stats  # fmt: skip
        found[spec] = []
        for place in range(DRAFTS):
            reached, passed = seam.counters.places("reached")[place], seam.counters.places("passed")[place]
            decided = float(stats.positions["decided"][place])
            accepted = float(stats.positions["accepted"][place])
            both = (passed + accepted) / (reached + decided)
            error = (both * (1 - both) * (1 / reached + 1 / decided)) ** 0.5
            found[spec].append(
                {
                    "place": place,
                    "engine": passed / reached,
                    "engine_n": reached,
                    "loop": accepted / decided,
                    "loop_n": decided,
                    "standard_error": error,
                }
            )
    stop(llm)
    return found


def lines_of(part: str, found: Any) -> list[str]:
    """A part as text."""
    if part == "overhead":
        from benchmarks.vllm_overhead import lines

        return lines(found)
    if part == "http":
        from benchmarks.vllm_http import lines

        return lines(found)
    if part == "agreement":
        return [
            f"{spec} place {row['place']}: engine {row['engine']:.4f} (n {row['engine_n']:.0f}), "
            f"loop {row['loop']:.4f} (n {row['loop_n']:.0f}), standard error {row['standard_error']:.4f}"
            for spec, places in found.items()
            for row in places
        ]
    said = [
        "| concurrency | mode | tokens/s | CPU ms/token | x engine, CPU (lowest, highest) | x engine, wall | verdict "
        "| stand per block |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for concurrency, modes in found.items():
        for name, row in modes.items():
            low, middle, high = row["against_engine_cpu"]
            said.append(
                f"| {concurrency} | {name} | {row['tokens_per_second']:.0f} | {row['cpu_ms_per_token']:.2f} | "
                f"{middle:.2f} ({low:.2f}, {high:.2f}) | {row['against_engine_wall'][1]:.2f} | "
                f"{row['verdict_share']:.1%} | {row['stands_per_block']:.2f} |"
            )
    return said


if __name__ == "__main__":
    sys.exit(main())
