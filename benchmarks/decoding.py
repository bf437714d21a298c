"""Decoding speed on one pair: our loop against transformers' assisted generation, and what it costs beside the models.

    OMP_NUM_THREADS=1 python -m benchmarks.decoding --shape smollm2 --limit 3 --max-new-tokens 32 --repetitions 7
    OMP_NUM_THREADS=1 python -m benchmarks.decoding --limit 16 --repetitions 7

All contestants take turns within each repetition, on the same prompts, one at a time; medians are given. Assisted
generation is configured fairly: the same constant number of draft tokens and confidence threshold 0, both set on the
assistant's own generation config, where transformers reads them. "In models" is wall time inside the forward passes of
drafter and verifier (encoders included) over wall time; "in verification" that inside ``verify_block``.

``--shape smollm2`` makes a Llama pair of SmolLM2-135M's shape (30 layers of 576, 49,152 tokens) and a drafter of its
first 6 layers, with random weights; otherwise the pair is read from a folder, by default
``$DEFERRAL_TRAIN_SHARED/models/multi30k-en-fr``. The head reads what `fit` takes by default. Goals are those of
verifiers of 100M parameters and more: lossless decoding 0.97 of its time in the models, any rule or head 0.96, and at
least 0.98 of assisted generation's rate (1.15 on the encoder-decoder pair, where it encodes once).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deferral_train import provenance
from deferral_train.decoding import generate
from deferral_train.decoding.pair import Pair, Settings, load_pair
from deferral_train.heads.gap import GapHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.rules import RULES, Rule, make_rule
from deferral_train.training.config import VERIFY_FEATURES

SHARED = Path(os.environ.get("DEFERRAL_TRAIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK: Callable[[], float] = time.perf_counter
ON_CUDA = torch.cuda.is_available()  # asked once: the question takes microseconds


class Stopwatch:
    """Adds up wall time inside marked calls; a call within a marked call is not counted twice."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._depth:
                return function(*arguments, **named)
            self._depth += 1
            began = CLOCK()
            try:
                result = function(*arguments, **named)
                if ON_CUDA:
                    torch.cuda.synchronize()
                return result
            finally:
                self.seconds += CLOCK() - began
                self._depth -= 1

        timed.__wrapped__ = function  # type: ignore[attr-defined]  # so that signatures are still seen
        return timed

    @contextlib.contextmanager
    def on(self, *methods: tuple[Any, str]) -> Iterator[Stopwatch]:
        """Time these methods (owner, name) while the context is open."""
        before = [(owner, name, vars(owner).get(name)) for owner, name in methods]
        for owner, name in methods:
            setattr(owner, name, self.around(getattr(owner, name)))
        try:
            yield self
        finally:
            for owner, name, own in before:
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)


@dataclass(frozen=True)
class Run:
    """One pass of a contestant over the prompts; shares are of its wall time."""

    tokens: int
    seconds: float
    models: float
    verification: float
    acceptance: float | None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def model_methods(pair: Pair) -> list[tuple[Any, str]]:
    """Everything that counts as time in the two models."""
    models = [pair.models.drafter, pair.models.verifier]
    encoders = [model.get_encoder() for model in models] if pair.models.is_encoder_decoder else []
    return [(model, "forward") for model in (*models, *encoders)]


def cascade(pair: Pair, prompts: list[EncodedPrompt], rule: Rule, settings: Settings) -> Run:
    """Our loop."""
    models, decisions = Stopwatch(), Stopwatch()
    with models.on(*model_methods(pair)), decisions.on((generate, "verify_block")):
        began = CLOCK()
        results = [
            pair.decode_batch(
                prompts[start : start + settings.batch_size], rule, settings, settings.stop, number
            )
            for number, start in enumerate(range(0, len(prompts), settings.batch_size))
        ]
        seconds = CLOCK() - began
    tokens = sum(int(result.stats.emitted.sum()) for result in results)
    calls = sum(int(result.stats.verifier_calls.sum()) for result in results)
    acceptance = tokens / calls if calls else None
    return Run(tokens, seconds, models.seconds / seconds, decisions.seconds / seconds, acceptance)


def transformers_own(pair: Pair, prompts: list[EncodedPrompt], settings: Settings, assisted: bool) -> Run:
    """transformers' greedy generation, one prompt at a time, plain or assisted."""
    drafter, verifier = pair.models.drafter, pair.models.verifier
    config = drafter.generation_config
    config.num_assistant_tokens = settings.num_draft_tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    options: dict[str, Any] = {"assistant_model": drafter} if assisted else {}
    models, tokens = Stopwatch(), 0
    with models.on(*model_methods(pair)):
        began = CLOCK()
        for prompt in prompts:
            ids = torch.tensor([prompt.input_ids], device=pair.models.device)
            output = verifier.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=list(pair.models.eos_ids) or None,
                **options,
            )
            tokens += output.shape[1] - (1 if pair.models.is_encoder_decoder else ids.shape[1])
        seconds = CLOCK() - began
    return Run(tokens, seconds, models.seconds / seconds, 0.0, None)


def contestants(
    pair: Pair, prompts: list[EncodedPrompt], arguments: argparse.Namespace
) -> dict[str, Callable[[], Run]]:
    """What is timed, by name."""
    settings = Settings(
        num_draft_tokens=arguments.draft_tokens,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=1,
        temperature=arguments.temperature,
    )
    torch.manual_seed(0)
    names = [
        name
        for name in RULES
        if name not in ("judge", "learned", "token_gap", "drafter_only", "verifier_only")
    ]
    rules = {name: make_rule(name) for name in (arguments.rules or names)}
    rules["head"] = learned_rule(GapHead(VERIFY_FEATURES).eval().requires_grad_(False), alpha=0.1)
    return {
        "verifier alone": lambda: transformers_own(pair, prompts, settings, False),
        "assisted": lambda: transformers_own(pair, prompts, settings, True),
        **{name: functools.partial(cascade, pair, prompts, rule, settings) for name, rule in rules.items()},
    }


def measure(runners: dict[str, Callable[[], Run]], repetitions: int) -> dict[str, list[Run]]:
    """Every contestant once to warm up, then in turns."""
    for run in runners.values():
        run()
    measured: dict[str, list[Run]] = {name: [] for name in runners}
    for _ in range(repetitions):
        for name, run in runners.items():
            measured[name].append(run())
    return measured


def summarize(measured: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Medians, and every repetition's rate; the ratio to assisted generation is that of each turn."""
    assisted = measured["assisted"]
    return {
        name: {
            "tokens_per_second": statistics.median(run.rate for run in runs),
            "over_assisted": statistics.median(run.rate / base.rate for run, base in zip(runs, assisted)),
            "share_in_models": statistics.median(run.models for run in runs),
            "share_in_verification": statistics.median(run.verification for run in runs),
            "tokens_per_verifier_call": runs[0].acceptance,
            "tokens": runs[0].tokens,
            "tokens_per_second_each": [run.rate for run in runs],
        }
        for name, runs in measured.items()
    }


def judge(table: dict[str, dict[str, Any]], is_encoder_decoder: bool) -> dict[str, Any]:
    """The goals: value reached, value asked for, met or not."""
    lossless = table["lossless"]
    others = [row for name, row in table.items() if name not in ("verifier alone", "assisted", "lossless")]
    goals = {"lossless over assisted": (lossless["over_assisted"], 1.15 if is_encoder_decoder else 0.98)}
    if not is_encoder_decoder:  # asked of verifiers of 100M parameters and more
        goals["share in models, lossless"] = (lossless["share_in_models"], 0.97)
        goals["share in models, any rule or head"] = (min(row["share_in_models"] for row in others), 0.96)
    return {
        name: {"reached": reached, "asked": asked, "met": reached >= asked}
        for name, (reached, asked) in goals.items()
    }


def conditions(pair: Pair, arguments: argparse.Namespace, prompts: list[EncodedPrompt]) -> dict[str, Any]:
    """What one must know to repeat the numbers."""
    sizes = {
        role: sum(p.numel() for p in getattr(pair.models, role).parameters())
        for role in ("drafter", "verifier")
    }
    return {
        "pair": Path(arguments.pair).name if arguments.pair else f"random, {arguments.shape}",
        "parameters": sizes,
        "prompts": len(prompts),
        "draft_tokens": arguments.draft_tokens,
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": 1,
        "temperature": arguments.temperature,
        "repetitions": arguments.repetitions,
        "device": str(pair.models.device),
        "clock": arguments.clock,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "provenance": provenance.collect({}),
    }


def smollm2_pair(device: str) -> tuple[Pair, list[Prompt]]:
    """A Llama pair of SmolLM2-135M's shape with random weights; the drafter is the verifier's first 6 layers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(49150)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(words), "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    verifier = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, **shape)).eval()
    for layer in verifier.model.layers[6:]:
        for parameter in layer.parameters():
            parameter.data.mul_(0.3)  # later layers change little, so that the drafter is often right
    drafter = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **shape)).eval()
    drafter.load_state_dict(verifier.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(1)
    texts = [
        " ".join(f"w{int(i)}" for i in torch.randint(0, 49150, (24,), generator=generator))
        for _ in range(512)
    ]
    pair = Pair(make_pair(drafter.to(device), verifier.to(device), tokenizer))
    return pair, [Prompt(str(number), text) for number, text in enumerate(texts)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", default=str(SHARED / "models" / "multi30k-en-fr"), help="folder with drafter/, verifier/"
    )
    parser.add_argument("--shape", choices=["smollm2"], help="a random pair of this shape instead")
    parser.add_argument("--rules", nargs="*", help="rules to time beside lossless and a head; default all")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", default=str(SHARED / "data" / "multi30k" / "val.en.gz"))
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=None, help="JSON file for the results")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: process time, for a busy machine"
    )
    arguments = parser.parse_args(argv)
    global CLOCK
    CLOCK = CLOCKS[arguments.clock]
    if arguments.rules is not None:
        arguments.rules = ["lossless", *(name for name in arguments.rules if name != "lossless")]
    if arguments.shape:
        arguments.pair = None
        pair, prompts = smollm2_pair(arguments.device)
        prompts = prompts[: arguments.limit]
    else:
        models = Path(arguments.pair)
        pair = load_pair(str(models / "drafter"), str(models / "verifier"), arguments.device, arguments.dtype)
        prompts = read_prompts(arguments.prompts, limit=arguments.limit)
    encoded = pair.encode(prompts, Settings(max_new_tokens=arguments.max_new_tokens))
    table = summarize(measure(contestants(pair, encoded, arguments), arguments.repetitions))
    result = {
        "conditions": conditions(pair, arguments, encoded),
        "table": table,
        "goals": judge(table, pair.models.is_encoder_decoder),
    }
    for name, row in table.items():
        print(
            f"{name:<16} {row['tokens_per_second']:8.1f} tok/s  over assisted {row['over_assisted']:.3f}  "
            f"in models {row['share_in_models']:.3f}  in verification {row['share_in_verification']:.4f}"
        )
    for name, goal in result["goals"].items():
        print(
            f"{name:<32} {goal['reached']:.3f} (asked {goal['asked']:.3f}) {'met' if goal['met'] else 'NOT met'}"
        )
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        provenance.write_json(arguments.out, json.loads(json.dumps(result)))
    return result


if __name__ == "__main__":
    main()
