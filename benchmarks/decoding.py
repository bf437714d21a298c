"""Decoding speed on one pair: our loop against transformers' assisted generation, and against itself.

    OMP_NUM_THREADS=1 python -m benchmarks.decoding --out benchmarks/results/decoding_cpu.json

All contestants take turns within each repetition, on the same prompts; medians over repetitions. Assisted generation
is configured fairly: the same constant number of draft tokens and confidence threshold 0, both set on the assistant's
own generation config, where transformers reads them. "In models" is wall time inside the forward passes of drafter
and verifier (encoders included) over wall time.

Batch 1 is one prompt per call of ``generate``, as assisted generation has it; larger batches get four batches' worth of
prompts per call, and a prompt takes the place of one that has ended.

What a rule or head costs is given twice. *Gross*: wall time inside the rule's part of verification, over wall time of
the run: putting the drafter's logits together (lossless verification never reads them), maxima, normalisers and
entropies, the head's features and its body, the comparison. *Added*: wall time outside the models per verified block,
less that of lossless decoding in the same repetition, over wall time per block; it holds whatever the rule causes
anywhere, noise, and at batch 1 the fixed cost of a call, which falls on fewer blocks where more is accepted. The goal
is judged by the gross share.

"compile WAY" rows run the models' short passes in fixed shapes, as CUDA graphs or through torch.compile; building them
falls on the warm-up. Their "in models" is time in those passes, prompts and encoders included.

Without ``--pair`` the benchmark trains no model: it reads the pair under
``$DEFERRAL_TRAIN_SHARED/models/multi30k-en-de``; ``--random LAYERS WIDTH`` makes a random Llama pair instead.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deferral_train import provenance
from deferral_train.decoding import greedy
from deferral_train.decoding.compiled import StaticModel
from deferral_train.decoding.pair import Pair, Settings, load_pair
from deferral_train.decoding.static_support import BACKENDS
from deferral_train.decoding.stepper import Stepper
from deferral_train.heads.gap import GapHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.rules import Rule, make_rule

SHARED = Path(os.environ.get("DEFERRAL_TRAIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK: Callable[[], float] = time.perf_counter
ON_CUDA = torch.cuda.is_available()  # asked once: the question takes microseconds
HEAD_FEATURES = ("drafter_max", "verifier_max", "verifier_at_drafter_argmax", "drafter_entropy", "tv")


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
    rule: float
    acceptance: float | None
    blocks: int = 0

    @property
    def outside(self) -> float:
        """Seconds per verified block outside the models."""
        return self.seconds * (1 - self.models) / self.blocks

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def model_methods(pair: Pair, compile: str = "off") -> list[tuple[Any, str]]:
    """Everything that counts as time in the two models."""
    models = [pair.models.drafter, pair.models.verifier]
    encoders = [model.get_encoder() for model in models] if pair.models.is_encoder_decoder else []
    if compile != "off":  # a recorded or compiled pass does not go through forward
        return [(StaticModel, "run"), (Stepper, "_forward"), *((one, "forward") for one in encoders)]
    return [(model, "forward") for model in (*models, *encoders)]


def cascade(pair: Pair, prompts: list[EncodedPrompt], rule: Rule, settings: Settings) -> Run:
    """Our loop."""
    models, decisions = Stopwatch(), Stopwatch()
    methods = [
        (greedy, "decisions_on_host"),
        (greedy, "decisions"),
        *((type(rule), name) for name in ("read", "defer", "keep", "step", "step_law")),
    ]
    methods = [(owner, name) for owner, name in methods if hasattr(owner, name)]
    with models.on(*model_methods(pair, settings.compile)), decisions.on(*methods):
        began = CLOCK()
        results = list(pair.batches(prompts, rule, settings))
        seconds = CLOCK() - began
    tokens = sum(int(result.stats.emitted.sum()) for result in results)
    calls = sum(int(result.stats.verifier_calls.sum()) for result in results)
    blocks = sum(result.stats.verifier_passes for result in results)
    return Run(tokens, seconds, models.seconds / seconds, decisions.seconds / seconds, tokens / calls, blocks)


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
    single = Settings(
        num_draft_tokens=arguments.draft_tokens,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=1,
        queue=1,
        compile="off",
    )
    batched = Settings(
        num_draft_tokens=arguments.draft_tokens,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        compile="off",
    )
    torch.manual_seed(0)
    head = learned_rule(GapHead(HEAD_FEATURES).eval().requires_grad_(False), alpha=0.1)
    lossless, opt = make_rule("lossless"), make_rule("opt", alpha=0.2)
    size = arguments.batch_size
    return {
        "transformers, verifier alone, batch 1": lambda: transformers_own(pair, prompts, single, False),
        "transformers, assisted, batch 1": lambda: transformers_own(pair, prompts, single, True),
        "cascade, lossless, batch 1": lambda: cascade(pair, prompts, lossless, single),
        "cascade, opt, batch 1": lambda: cascade(pair, prompts, opt, single),
        "cascade, head, batch 1": lambda: cascade(pair, prompts, head, single),
        f"cascade, lossless, batch {size}": lambda: cascade(pair, prompts, lossless, batched),
        f"cascade, opt, batch {size}": lambda: cascade(pair, prompts, opt, batched),
        f"cascade, head, batch {size}": lambda: cascade(pair, prompts, head, batched),
        **{
            f"compile {way}, lossless, batch {settings.batch_size}": functools.partial(
                cascade, pair, prompts, lossless, replace(settings, compile=way)
            )
            for way in _ways(arguments)
            for settings in (single, batched)
        },
    }


def _ways(arguments: argparse.Namespace) -> list[str]:
    """Values of ``compile`` to set beside ordinary passes."""
    if arguments.compile is not None:
        return list(arguments.compile)
    return ["static", "inductor"] if arguments.device.startswith("cuda") else ["inductor"]


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
    """Medians, and every repetition's rate."""
    lossless = {
        batch: runs for name, runs in measured.items() for batch in _batch_of(name, "cascade, lossless, ")
    }
    return {
        name: {
            "tokens_per_second": statistics.median(run.rate for run in runs),
            "share_in_models": statistics.median(run.models for run in runs),
            "share_in_rule": statistics.median(run.rule for run in runs),
            "share_added": _added(
                runs, [base for batch in _batch_of(name, "cascade, ") for base in lossless[batch]]
            ),
            "tokens_per_verifier_call": runs[0].acceptance,
            "tokens": runs[0].tokens,
            "tokens_per_second_each": [run.rate for run in runs],
        }
        for name, runs in measured.items()
    }


def _batch_of(name: str, start: str) -> list[str]:
    """The batch of a contestant whose name starts so, as a list of one; empty for any other."""
    return [name.rpartition(", ")[2]] if name.startswith(start) else []


def _added(runs: list[Run], lossless: list[Run]) -> float | None:
    """Median share of wall time that a rule adds per block outside the models."""
    if not lossless:
        return None
    return statistics.median(
        (run.outside - base.outside) * run.blocks / run.seconds for run, base in zip(runs, lossless)
    )


def judge(table: dict[str, dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """The goals: value reached, value asked for, met or not."""
    assisted, ours = table["transformers, assisted, batch 1"], table["cascade, lossless, batch 1"]
    batched = table[f"cascade, lossless, batch {batch_size}"]
    costs = {name: row["share_in_rule"] for name, row in table.items() if "opt" in name or "head" in name}
    ratio = ours["tokens_per_second"] / assisted["tokens_per_second"]
    goals = {
        "tokens/s over assisted": (ratio, 0.9 / assisted["share_in_models"], True),
        "share in models, batch 1": (ours["share_in_models"], 0.90, True),
        f"batch {batch_size} over batch 1": (
            batched["tokens_per_second"] / ours["tokens_per_second"],
            5.0,
            True,
        ),
        "gross share of rule or head": (max(costs.values()), 0.03, False),
    }
    return {
        name: {
            "reached": reached,
            "asked": asked,
            "met": (reached >= asked) if at_least else reached <= asked,
        }
        for name, (reached, asked, at_least) in goals.items()
    }


def conditions(pair: Pair, arguments: argparse.Namespace, prompts: list[EncodedPrompt]) -> dict[str, Any]:
    """What one must know to repeat the numbers."""
    sizes = {
        role: sum(p.numel() for p in getattr(pair.models, role).parameters())
        for role in ("drafter", "verifier")
    }
    return {
        "pair": Path(arguments.pair).name if arguments.pair else "random",
        "parameters": sizes,
        "prompts": len(prompts),
        "draft_tokens": arguments.draft_tokens,
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size,
        "prompts_per_call": {
            "batch 1": 1,
            f"batch {arguments.batch_size}": arguments.batch_size * Settings().queue,
        },
        "repetitions": arguments.repetitions,
        "device": str(pair.models.device),
        "clock": arguments.clock,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "provenance": provenance.collect({}),
    }


def random_pair(layers: int, width: int, device: str) -> tuple[Pair, list[Prompt]]:
    """A Llama pair with random weights: a drafter of a quarter of the layers that shares the verifier's first ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(8190)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(words), "hidden_size": width, "intermediate_size": 4 * width,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
        "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    verifier = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape))
    for layer in verifier.model.layers[layers // 4 :]:
        for parameter in layer.parameters():
            parameter.data.mul_(0.3)  # later layers change little, so that the drafter is often right
    drafter = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers // 4, **shape))
    drafter.load_state_dict(verifier.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(1)
    texts = [
        " ".join(f"w{int(i)}" for i in torch.randint(0, 8190, (24,), generator=generator)) for _ in range(512)
    ]
    pair = Pair(make_pair(drafter.to(device), verifier.to(device), tokenizer))
    return pair, [Prompt(str(number), text) for number, text in enumerate(texts)]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", default=str(SHARED / "models" / "multi30k-en-de"), help="folder with drafter/, verifier/"
    )
    parser.add_argument(
        "--random", nargs=2, type=int, metavar=("LAYERS", "WIDTH"), help="a random Llama pair instead"
    )
    parser.add_argument("--prompts", default=str(SHARED / "data" / "multi30k" / "val.en.gz"))
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=None, help="JSON file for the results")
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=BACKENDS,
        help="passes of fixed shape to set beside ordinary ones; default inductor, on CUDA static and inductor",
    )
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: process time, for a busy machine"
    )
    arguments = parser.parse_args(argv)
    global CLOCK
    CLOCK = CLOCKS[arguments.clock]
    if arguments.random:
        arguments.pair = None
        pair, prompts = random_pair(*arguments.random, arguments.device)
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
        "goals": judge(table, arguments.batch_size),
    }
    for name, row in table.items():
        print(
            f"{name:<40} {row['tokens_per_second']:8.1f} tok/s  in models {row['share_in_models']:.3f}  "
            f"in rule {row['share_in_rule']:.4f}"
            + ("" if row["share_added"] is None else f"  added {row['share_added']:.4f}")
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
