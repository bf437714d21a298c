"""What the engine benchmarks share: a pair that the engine loads, prompts, engines in this process, a fitted head."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # compiling a few small kernels takes longer than the benchmark
}
os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})

from deferral_train.errors import InputError  # noqa: E402 - the engine reads the environment when imported

CONCURRENCY = (1, 8, 32)
DRAFTS, CONTEXT, PROMPT = 4, 128, 32


def train(folder: Path, steps: int) -> Path:
    """A pair whose verifier pass is several times a drafter pass; heads of 64, which the CPU kernels know."""
    from deferral_train.pairs.scratch.progress import TrainingBars
    from deferral_train.pairs.scratch.train import train_pair
    from deferral_train.pairs.scratch.train_config import ModelSize, PairConfig, Schedule

    config = PairConfig(
        vocab_size=2048,
        context=CONTEXT,
        drafter=ModelSize(1, 128, 2, 384),
        verifier=ModelSize(8, 256, 4, 768),
        drafter_schedule=Schedule(steps + steps // 6, 8, 3e-3),
        verifier_schedule=Schedule(steps, 8, 1e-3),
        autocast=True,
    )
    with TrainingBars() as bars:
        result = train_pair(config, folder, bars)
    print(
        f"pair: verifier {result.gate.verifier_nats:.3f} nats a token, drafter {result.gate.drafter_nats:.3f}, "
        f"cost ratio {result.gate.cost_ratio:.1f}"
    )
    return folder


def make_large(folder: Path) -> Path:
    """A pair of random weights whose verifier has 12 layers of 768 and 8192 pieces, 105 million parameters with the
    embeddings; drafter 1 layer of 128.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deferral_train.pairs.corpora import stdlib_sources
    from deferral_train.pairs.scratch.tokenizer import train_tokenizer

    tokenizer = train_tokenizer((document.text for document in stdlib_sources()["validation"]), 8192, False)
    for name, layers, width in (("drafter", 1, 128), ("verifier", 12, 768)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=CONTEXT,
            tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def prompts_of(pair: Path, count: int) -> list[list[int]]:
    """Code prompts of `PROMPT` tokens from the standard library's test part."""
    from transformers import AutoTokenizer

    from deferral_train.pairs.corpora import stdlib_sources

    tokenizer = AutoTokenizer.from_pretrained(pair / "verifier")
    rows: list[list[int]] = []
    for document in stdlib_sources()["test"]:
        ids = tokenizer(document.text).input_ids
        rows += [ids[start : start + PROMPT] for start in range(0, min(len(ids), 2000) - PROMPT, 97)]
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


def stop(*engines: Any) -> None:
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()


def fit_head(pair: Path, scratch: Path, rows: list[list[int]], tokens: int) -> str:
    """Log lossless traffic of an engine, fit a gap head on it, export it."""
    from deferral_train.training.config import FitConfig
    from deferral_train.training.fit import fit

    llm = start(pair, {"log": {"folder": str(scratch / "traces"), "fraction": 1.0, "queue": 1_000_000}})
    try:
        ask(llm, rows, tokens)
    finally:
        stop(llm)
    config = FitConfig(train=str(scratch / "traces"), truth="verifier", hidden=(32,), epochs=8)
    head = fit(config, scratch / "fit").head
    head.metadata["alpha"] = 0.05
    head.save_pretrained(scratch / "head")
    return str(scratch / "head")


def paired(runs: list[dict[str, float]], baseline: list[dict[str, float]], clock: str) -> list[float]:
    """Speed relative to the baseline in each round: its time / own time; lowest, median, highest."""
    ratios = sorted(theirs[clock] / ours[clock] for ours, theirs in zip(runs, baseline))
    return [ratios[0], statistics.median(ratios), ratios[-1]]
