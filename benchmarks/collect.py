"""Collecting against the two bare forward passes over the same batches, with bytes per token and memory.

    python -m benchmarks.collect                     # a trained T5 pair, CPU (--pair FOLDER holds drafter/, verifier/)
    python -m benchmarks.collect --device cuda       # random weights: a Llama verifier of 1.1B parameters

Repetitions interleave bare passes and collecting in one process; ratios are of medians of wall time. A bare pass runs
both models over the very batches of the collect plan, with the same padding and the same kept logits, and drops them;
encoding the prompts is not in it. Collecting is timed whole: encoding, folder checks, Lightning's start, writing with
fsync. Its writer has a thread of its own, so that on a second core the work beside the passes overlaps with them; the
ratio of CPU seconds, which no overlap hides, stands beside. Memory is the high-water mark of a process of its own, at
two numbers of tokens. Without a pair on the CPU, random T5 models of the shared pair's shape stand in.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import SHARED, begin, finish, flags
from deferral_train.collecting import CollectConfig, collect
from deferral_train.collecting.plan import make_plan
from deferral_train.collecting.scoring import make_inputs, score
from deferral_train.pairs.load import ModelPair, load_models, make_pair
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.traces import open_traces

LIMITS = {"cpu": 0.70, "cuda": 0.95}
BYTES = {64: 1150, 0: 120}
# Bytes that others store for a token, as their code, documentation or users report it.
PEERS = {
    "JointAdaSpec, 19 scalars (measured)": 33,
    "SpecDec++, log-probabilities of the drawn token": 80,
    "CITER, hidden state": 6_100,
    "R2R, hidden state and 100 drafter logits": 7_400,
    "SpecForge, hidden states (its issue 426)": 17_900,
    "DeepSpec, hidden states of six layers at 4B": 30_700,
    "speculators, hidden states (its documentation)": 32_800,
}


def main() -> int:
    options = parse()
    begin(options)
    pair, prompts, name = workload(options)
    if options.memory_of is not None:
        print(json.dumps(memory(pair, prompts[: options.memory_of], options)))
        return 0
    result = {
        "pair": name,
        "repetitions": options.repetitions,
        "limits": {"ratio": LIMITS[options.device], "bytes": BYTES},
        "top_k": {str(k): compare(pair, prompts, k, options) for k in (64, 0)},
        "memory": [memory_in_child(count, options) for count in (len(prompts) // 4, len(prompts))],
        "peers_bytes_per_token": PEERS,
    }
    return finish("collect", options, result, table(result))


def parse() -> argparse.Namespace:
    parser = flags(__doc__)
    parser.add_argument("--pair", type=Path, default=SHARED / "models" / "multi30k-en-de")
    parser.add_argument("--text", type=Path, default=SHARED / "data" / "multi30k")
    parser.add_argument("--split", default="train", help="of the text")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def workload(options: argparse.Namespace) -> tuple[ModelPair, list[Prompt], str]:
    """Pair, prompts and what to call them."""
    if options.device == "cuda":
        return random_llama_pair(), random_prompts(options, 64, 256), "random Llama, 1.1B and 0.16B, bfloat16"
    if options.pair.is_dir() and options.text.is_dir():
        pair = load_models(options.pair / "drafter", options.pair / "verifier", "cpu")
        source, target = (options.text / f"{options.split}.{language}.gz" for language in ("en", "de"))
        prompts = read_prompts(source, reference_path=target, limit=options.prompts)
        return (
            pair,
            prompts,
            f"trained T5 pair {options.pair.name}, {len(prompts):,} prompts of {options.split}",
        )
    return random_t5_pair(), random_prompts(options, 14, 18), "random T5 pair of 0.4M and 2M parameters"


def word_tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def random_prompts(options: argparse.Namespace, prompt: int, reference: int) -> list[Prompt]:
    """Random words, lengths spread around the given means."""
    random = np.random.default_rng(options.seed)

    def text(mean: int) -> str:
        return " ".join(f"w{n}" for n in random.integers(0, 3900, random.integers(mean // 2, mean * 3 // 2)))

    return [Prompt(str(n), text(prompt), text(reference)) for n in range(options.prompts)]


def random_t5_pair() -> ModelPair:
    from transformers import T5Config, T5ForConditionalGeneration

    def model(width: int, layers: int, inner: int, heads: int) -> Any:
        sizes = {"d_model": width, "num_layers": layers, "num_decoder_layers": layers, "d_ff": inner}
        config = T5Config(vocab_size=4000, num_heads=heads, d_kv=32, feed_forward_proj="gated-gelu", **sizes)
        return T5ForConditionalGeneration(config)

    torch.manual_seed(0)
    return make_pair(model(64, 1, 192, 2), model(144, 2, 576, 4), word_tokenizer(4000))


def random_llama_pair() -> ModelPair:
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(width: int, layers: int, inner: int, heads: int) -> Any:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
        config = LlamaConfig(
            vocab_size=32000,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            dtype="bfloat16",
            **sizes,
        )
        with torch.device("cuda"):
            return LlamaForCausalLM(config).to(torch.bfloat16)

    torch.manual_seed(0)
    return make_pair(model(768, 12, 2048, 12), model(2048, 22, 5632, 32), word_tokenizer(32000))


def config(k: int, options: argparse.Namespace) -> CollectConfig:
    return CollectConfig(
        log_top_k=k, batch_tokens=options.batch_tokens, seed=options.seed, device=options.device
    )


def compare(pair: ModelPair, prompts: list[Prompt], k: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of bare passes and of collecting, their ratio, bytes per token."""
    plan = make_plan(config(k, options), pair, prompts, None)
    bare, whole, size = [], [], 0
    for repetition in range(options.repetitions + 1):  # the first is a warm-up
        bare.append(seconds_of(lambda: bare_passes(pair, plan)))
        with tempfile.TemporaryDirectory() as folder:
            run = CollectRun(config(k, options), folder, pair, prompts)
            whole.append(seconds_of(run))
            size = open_traces(folder).bytes
        print(
            f"  top {k}, repetition {repetition}: bare {bare[-1][0]:.2f} s (CPU {bare[-1][1]:.2f}), "
            f"collect {whole[-1][0]:.2f} s (CPU {whole[-1][1]:.2f})",
            flush=True,
        )
    wall, cpu = ([statistics.median(t[way] for t in times[1:]) for times in (bare, whole)] for way in (0, 1))
    return {
        "tokens": plan.tokens,
        "batch_tokens": plan.manifest.chunking["batch_tokens"],
        "bare_tokens_per_second": plan.tokens / wall[0],
        "collect_tokens_per_second": plan.tokens / wall[1],
        "ratio": wall[0] / wall[1],
        "cpu_ratio": cpu[0] / cpu[1],
        "bytes_per_token": size / plan.tokens,
        "seconds": {"bare": [t[0] for t in bare[1:]], "collect": [t[0] for t in whole[1:]]},
        "cpu_seconds": {"bare": [t[1] for t in bare[1:]], "collect": [t[1] for t in whole[1:]]},
    }


@dataclass(frozen=True)
class CollectRun:
    """One whole call of ``collect``."""

    config: CollectConfig
    folder: str
    pair: ModelPair
    prompts: list[Prompt]

    def __call__(self) -> None:
        collect(self.config, self.folder, progress=False, models=self.pair, prompts=self.prompts)


def seconds_of(call: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start[0], time.process_time() - start[1]


@torch.inference_mode()
def bare_passes(pair: ModelPair, plan: Any) -> None:
    """Both models over the very batches that collecting runs, and nothing else."""
    for chunk in plan.manifest.chunks:
        for batch in chunk.batches:
            prompts = [plan.prompts[number] for number in batch]
            ids, tokens = [p.input_ids for p in prompts], [p.reference_ids for p in prompts]
            for model in (pair.drafter, pair.verifier):
                score(model, make_inputs(model, ids, tokens, pair.device))
    if pair.device.type == "cuda":
        torch.cuda.synchronize()


def memory(pair: ModelPair, prompts: list[Prompt], options: argparse.Namespace) -> dict[str, Any]:
    """High-water mark of this process before and after collecting."""
    small = prompts[:300]
    with tempfile.TemporaryDirectory() as folder:
        collect(config(64, options), folder, progress=False, models=pair, prompts=small)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        collect(config(64, options), folder, progress=False, models=pair, prompts=prompts)
        tokens = len(open_traces(folder))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens": tokens,
        "peak_megabytes": after / 1024,
        "above_one_shard_megabytes": (after - before) / 1024,
    }


def memory_in_child(count: int, options: argparse.Namespace) -> dict[str, Any]:
    arguments = [
        f"--{name}={getattr(options, name)}"
        for name in ("device", "pair", "text", "split", "prompts", "threads", "seed")
    ]
    command = [sys.executable, "-m", "benchmarks.collect", *arguments, f"--memory-of={count}"]
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )


def table(result: dict[str, Any]) -> str:
    lines = [result["pair"]]
    for k, row in result["top_k"].items():
        speeds = (
            f"{row['collect_tokens_per_second']:,.0f} tokens/s, bare {row['bare_tokens_per_second']:,.0f}"
        )
        ratio = f"ratio {row['ratio']:.2f} (limit {result['limits']['ratio']}), of CPU time {row['cpu_ratio']:.2f}"
        size = f"{row['bytes_per_token']:,.0f} bytes/token (limit {BYTES[int(k)]:,})"
        lines.append(f"  top {k:>2}: {speeds}, {ratio}, {size}")
    lines += [f"  {row['tokens']:,} tokens: peak {row['peak_megabytes']:.0f} MB" for row in result["memory"]]
    lines += [f"  {size:>8,} bytes/token  {peer}" for peer, size in PEERS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
