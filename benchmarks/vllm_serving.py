"""The plug-in inside vLLM: speed against the engine's own speculation, overheads, acceptance, by concurrency.

    make test-vllm                                   # makes .venv-vllm
    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_serving --device cpu --out OUT.json

Trains a small Llama pair first (`train-pair` on the standard library's sources; --pair FOLDER takes a finished one).
All engines live in this one process and are asked in turn, round by round, so that a busy machine is busy for all of
them; ratios are of medians over rounds. Greedy decoding, prompts of the same text, every request to its full length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from deferral_train import provenance
from deferral_train.errors import InputError

CONCURRENCY = (1, 8, 32)
DRAFTS, CONTEXT = 4, 128


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--pair", type=Path, help="folder with drafter/ and verifier/; default: train one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("all", "speed", "overhead", "agreement"), default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="tokens per request")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
    parser.add_argument("--rules", nargs="+", default=["token_v3:alpha=0.5", "opt:alpha=0.1"])
    options = parser.parse_args()
    try:
        import vllm
    except ImportError:
        print(
            "vllm_serving: vLLM is not installed here; run it in .venv-vllm (make test-vllm)", file=sys.stderr
        )
        return 2
    parts = {"speed", "overhead", "agreement"} if options.part == "all" else {options.part}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if parts & {"speed", "agreement"}:
            pair = options.pair or train(Path(scratch) / "pair", options.steps)
        if "agreement" in parts:
            result["agreement"] = agreement(pair, options.rules)
        if "speed" in parts:
            result |= measure(pair, Path(scratch), options)
        if "overhead" in parts:
            result["overhead"] = overhead(Path(scratch), options)
    result["conditions"] = {
        "vllm": vllm.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rounds": options.rounds,
        "tokens": options.tokens,
        "drafted": DRAFTS,
        "dtype": "float32",
        "provenance": provenance.collect(),
    }
    report(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return 0


def train(folder: Path, steps: int) -> Path:
    """A pair whose verifier pass is several times a drafter pass; heads of 32 and 64, which the CPU kernels know."""
    from deferral_train.pairs.progress import TrainingBars
    from deferral_train.pairs.train import train_pair
    from deferral_train.pairs.train_config import ModelSize, PairConfig, Schedule

    config = PairConfig(
        vocab_size=2048,
        context=CONTEXT,
        drafter=ModelSize(1, 64, 2, 192),
        verifier=ModelSize(8, 256, 4, 768),
        drafter_schedule=Schedule(steps, 6, 3e-3),
        verifier_schedule=Schedule(steps, 6, 1e-3),
    )
    with TrainingBars() as bars:
        result = train_pair(config, folder, bars)
    print(
        f"pair: verifier {result.gate.verifier_nats:.3f} nats a token, drafter {result.gate.drafter_nats:.3f}, "
        f"cost ratio {result.gate.cost_ratio:.1f}"
    )
    return folder


def prompts_of(pair: Path, count: int) -> list[list[int]]:
    """Code prompts of 32 tokens from the standard library's test part."""
    from transformers import AutoTokenizer

    from deferral_train.pairs.corpora import stdlib_sources

    tokenizer = AutoTokenizer.from_pretrained(pair / "verifier")
    rows: list[list[int]] = []
    for document in stdlib_sources()["test"]:
        ids = tokenizer(document.text).input_ids
        rows += [ids[start : start + 32] for start in range(0, min(len(ids), 2000) - 32, 97)]
        if len(rows) >= count:
            return rows[:count]
    raise InputError(f"the standard library gave {len(rows)} prompts, {count} are needed")


def start(pair: Path, deferral: dict | None = None, drafter: bool = True) -> Any:
    from vllm import LLM

    settings: dict[str, Any] = {}
    if drafter:
        settings["speculative_config"] = {
            "model": str(pair / "drafter"),
            "method": "draft_model",
            "num_speculative_tokens": DRAFTS,
            "draft_sample_method": "probabilistic",
        }
    if deferral is not None:
        settings["additional_config"] = {"deferral": deferral}
    return LLM(
        model=str(pair / "verifier"), dtype="float32", max_model_len=CONTEXT, max_num_seqs=max(CONCURRENCY),
        enforce_eager=True, enable_prefix_caching=False, seed=0, **settings,
    )  # fmt: skip


def ask(llm: Any, rows: list[list[int]], tokens: int) -> tuple[list[list[int]], float, float]:
    """Texts, wall seconds and CPU seconds of one batch of greedy requests."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return [list(output.outputs[0].token_ids) for output in outputs], wall, cpu


def seam_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.rejection_sampler.seam


def use(llm: Any, settings: dict[str, Any]) -> Any:
    """Other settings in a running engine."""
    from deferral_train.serving.config import ServingConfig

    seam = seam_of(llm)
    config = ServingConfig.parse(settings)
    seam.adopt(config, config.make_rule())
    seam.counters.values[:] = 0
    return seam


def fit_head(pair: Path, scratch: Path, rows: list[list[int]], tokens: int) -> str:
    """Log lossless traffic of an engine, fit a gap head on it, export it."""
    from deferral_train.training.config import FitConfig
    from deferral_train.training.fit import fit

    llm = start(pair, {"log": {"folder": str(scratch / "traces"), "fraction": 1.0, "queue": 1_000_000}})
    try:
        ask(llm, rows, tokens)
    finally:
        llm.llm_engine.engine_core.shutdown()
    config = FitConfig(train=str(scratch / "traces"), truth="verifier", hidden=(32,), epochs=8)
    head = fit(config, scratch / "fit").head
    head.metadata["alpha"] = 0.05
    head.save_pretrained(scratch / "head")
    return str(scratch / "head")


def measure(pair: Path, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = prompts_of(pair, 4 * max(CONCURRENCY))
    head = fit_head(pair, scratch, rows, options.tokens)
    engines = {
        "none": start(pair, drafter=False),
        "engine": start(pair),
        "plug-in": start(pair, {"rule": "lossless"}),
    }
    logging = start(pair, {"log": {"folder": str(scratch / "logged"), "fraction": 0.1}})
    modes: dict[str, tuple[Any, Callable[[], Any]]] = {
        "no speculation": (engines["none"], lambda: None),
        "engine's speculation": (engines["engine"], lambda: None),
        "plug-in lossless": (engines["plug-in"], lambda: use(engines["plug-in"], {"rule": "lossless"})),
        "lossless, logging 10%": (logging, lambda: None),
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
        lossless = ("no speculation", "engine's speculation", "plug-in lossless", "lossless, logging 10%")
        emitted = concurrency * options.tokens
        table[concurrency] = {
            name: {
                "tokens_per_second": emitted / statistics.median(run["wall"] for run in runs),
                "cpu_ms_per_token": 1e3 * statistics.median(run["cpu"] for run in runs) / emitted,
                "verdict_share": statistics.median(run["verdict"] for run in runs),
                "stands_per_block": statistics.median(run["stands"] for run in runs),
                "identical_to_verifier": texts[name] == texts["no speculation"],
                "against_engine": paired(runs, found["engine's speculation"], "cpu"),
                "against_engine_wall": paired(runs, found["engine's speculation"], "wall"),
            }
            for name, runs in found.items()
        }
        differing = [name for name in lossless if texts[name] != texts["no speculation"]]
        if differing:
            raise RuntimeError(f"greedy text differs from the verifier's own: {', '.join(differing)}")
    return {"table": table}


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
    llm.llm_engine.engine_core.shutdown()
    return found


def overhead(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Verdict and head as a share of wall time with a verifier of 12 layers of 768, random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deferral_train.heads import GapHead
    from deferral_train.pairs.corpora import stdlib_sources
    from deferral_train.pairs.tokenizer import train_tokenizer
    from deferral_train.training.config import VERIFY_FEATURES

    tokenizer = train_tokenizer((document.text for document in stdlib_sources()["validation"]), 8192, False)
    for name, layers, width in (("drafter", 1, 128), ("verifier", 12, 768)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=CONTEXT,
            tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(scratch / "large" / name)
        tokenizer.save_pretrained(scratch / "large" / name)
    head = GapHead(VERIFY_FEATURES, hidden=(64, 64))
    head.metadata["alpha"] = 0.05
    head.save_pretrained(scratch / "untrained")
    llm = start(scratch / "large", {"rule": "lossless"})
    rows = [list(range(10 + number, 42 + number)) for number in range(max(CONCURRENCY))]
    found: dict[str, Any] = {}
    for concurrency in CONCURRENCY:
        for name, settings in (
            *((spec, {"rule": spec}) for spec in options.rules),
            ("head", {"head": str(scratch / "untrained")}),
        ):
            seen = []
            for _ in range(3):
                seam = use(llm, settings)
                _, wall, _ = ask(llm, rows[:concurrency], options.tokens)
                steps = seam.counters.get("steps")
                verdict = seam.counters.get("verdict_seconds")
                seen.append((verdict / wall, 1e3 * verdict / steps, 1e3 * wall / steps))
            share, verdict_ms, step_ms = (statistics.median(column) for column in zip(*seen))
            found[f"{concurrency} {name}"] = {"share": share, "verdict_ms": verdict_ms, "step_ms": step_ms}
    llm.llm_engine.engine_core.shutdown()
    return found


def paired(runs: list[dict[str, float]], baseline: list[dict[str, float]], clock: str) -> float:
    """Speed relative to the baseline: median over rounds of baseline time / own time."""
    return statistics.median(theirs[clock] / ours[clock] for ours, theirs in zip(runs, baseline))


def shares(seam: Any, wall: float) -> dict[str, float]:
    if seam is None:
        return {"verdict": 0.0, "stands": float("nan")}
    counters = seam.counters
    blocks = counters.get("blocks")
    stands = (counters.get("kept") + counters.get("accepted")) / blocks if blocks else float("nan")
    return {"verdict": counters.get("verdict_seconds") / wall, "stands": stands}


def report(result: dict[str, Any]) -> None:
    for spec, places in result.get("agreement", {}).items():
        for row in places:
            print(
                f"{spec} place {row['place']}: engine {row['engine']:.4f} (n {row['engine_n']:.0f}), "
                f"loop {row['loop']:.4f} (n {row['loop_n']:.0f}), standard error {row['standard_error']:.4f}"
            )
    for name, row in result.get("overhead", {}).items():
        print(
            f"{name}: verdict {row['verdict_ms']:.2f} ms of a {row['step_ms']:.0f} ms step, {row['share']:.1%}"
        )
    if "table" not in result:
        return
    print(
        "| concurrency | mode | tokens/s | CPU ms/token | x engine, CPU | x engine, wall | verdict | per block |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for concurrency, modes in result["table"].items():
        for name, row in modes.items():
            print(
                f"| {concurrency} | {name} | {row['tokens_per_second']:.0f} | {row['cpu_ms_per_token']:.2f} | "
                f"{row['against_engine']:.2f} | {row['against_engine_wall']:.2f} | {row['verdict_share']:.1%} | "
                f"{row['stands_per_block']:.2f} |"
            )


if __name__ == "__main__":
    sys.exit(main())
