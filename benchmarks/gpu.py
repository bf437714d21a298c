"""What a GPU does with this package, in one run of at most eight minutes that needs nothing installed.

    PYTHONPATH=. python -m benchmarks.gpu --device cuda --out results.json      # make bench-gpu
    PYTHONPATH=. python -m benchmarks.gpu --small                               # toy shapes, on a CPU, in a minute

Parts, each skipped once the minutes are spent: the tests marked ``gpu``; verification of a drafted block against two
``logsumexp``; decoding with random weights of Qwen3 0.6B and 8B shape in bfloat16, made on the device, at batch 1 and
16, with 5 drafted tokens of which 0, 3 or 5 are accepted; collecting against bare passes; a fit.

Acceptance is forced from outside: at every position both models are made all but certain of one token, and the drafter
of a wrong one wherever a block is to end. So lossless decoding, lossy rules, a head and transformers' assisted
generation draft equal lengths and emit the same text, which is checked. "models" is the share of the time that lies
within the models' forward passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import begin, finish, flags
from deferral_train.decoding import cascade_generate
from deferral_train.heads import GapHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.load import ModelPair, make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import Rule, Summary, make_rule, verify_block
from deferral_train.training.config import VERIFY_FEATURES, FitConfig

ROOT = Path(__file__).resolve().parents[1]
DRAFTS = 5
BATCHES = (1, 16)
ACCEPTED = (0, 3, 5)
CERTAIN = 200.0  # added to a logit, beyond what random weights give any other
STRIDE = 7919  # from one forced token to the next


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of everything: of models that people serve, or of toys."""

    vocabulary: int
    drafter: dict[str, int]
    verifier: dict[str, int]
    dtype: torch.dtype
    prompt: int
    blocks: int  # to be decoded in a call
    repetitions: int
    sequences: int  # of the collected set, and of the fitted


NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8}
FULL = Shape(
    vocabulary=151_936,
    drafter=QWEN3 | dict(zip(NAMES, (1024, 3072, 28, 16))), verifier=QWEN3 | dict(zip(NAMES, (4096, 12_288, 36, 32))),
    dtype=torch.bfloat16, prompt=64, blocks=12, repetitions=2, sequences=64,
)  # fmt: skip
TOY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SMALL = Shape(
    vocabulary=499, drafter={**TOY, "num_hidden_layers": 1}, verifier={**TOY, "num_hidden_layers": 2},
    dtype=torch.float32, prompt=6, blocks=2, repetitions=1, sequences=8,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts one after another, print one table, write the JSON; 1 where a part failed."""
    parser = flags(__doc__, devices=("cpu", "cuda"))
    parser.add_argument(
        "--small", action="store_true", help="toy shapes: whether everything runs, not how fast"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after these")
    options = parser.parse_args(arguments)
    begin(options)
    shape = SMALL if options.small else FULL
    deadline = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {
        "shape": {"name": "small" if options.small else "qwen3-0.6B-8B", "dtype": str(shape.dtype)}
    }
    result |= {"torch": torch.__version__, "parts": {}}
    for name, part in PARTS.items():
        if time.monotonic() > deadline:
            result["parts"][name] = {"skipped": f"the {options.minutes:g} minutes were spent"}
            continue
        began = time.monotonic()
        try:
            found = part(shape, options, deadline)
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        result["parts"][name] = found | {"seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {result['parts'][name]['seconds']} s", flush=True)
    finish("gpu", options, result, table(result))
    return int(any("failed" in part for part in result["parts"].values()))


# Clocks


def synchronize(device: str) -> None:
    """Wait for what runs on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call, and of what it started on the device."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def median_of(calls: dict[str, Callable[[], Any]], repetitions: int, device: str) -> dict[str, float]:
    """Median seconds of each, taking turns, after one call of each for warming up."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(seconds_of(call, device))
    return {name: statistics.median(column) for name, column in times.items()}


class PassClock:
    """Time within the forward passes of some models: between events on a GPU, on the wall clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.on_cuda, self.spans = device == "cuda", []

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def on(self, *models: Any) -> Iterator[PassClock]:
        """Count while open."""
        handles = []
        for model in models:
            handles.append(model.register_forward_pre_hook(lambda *_: self.spans.append([self._now()])))
            handles.append(model.register_forward_hook(lambda *_: self.spans[-1].append(self._now())))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @property
    def seconds(self) -> float:
        """Sum over the passes."""
        if not self.on_cuda:
            return sum(end - start for start, end in self.spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1000


# Models whose next token is known


class Forced:
    """A random model that is certain of one token at every position, or of a wrong one where ``wrong`` says so.

    Installed as hooks: the decoder's pass tells how many columns lie behind it, the output layer's logits are raised.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.vocabulary, self.prompt, self.period = vocabulary, 0, 0
        self._end = 0
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.get_output_embeddings().register_forward_hook(self._raise),
        ]

    def remove(self) -> None:
        """Give the model back its own opinion."""
        for handle in self._handles:
            handle.remove()

    def wrong_every(self, period: int, prompt: int) -> None:
        """Be wrong at each ``period``-th position behind the prompt; 0 is never."""
        self.period, self.prompt = period, prompt

    def _before(self, model: Any, arguments: Any, named: dict[str, Any]) -> None:
        ids, cache = (
            named["input_ids"] if "input_ids" in named else arguments[0],
            named.get("past_key_values"),
        )
        self._end = ids.shape[1] + (0 if cache is None else int(cache.get_seq_length()))

    def _raise(self, module: Any, arguments: Any, logits: Tensor) -> Tensor:
        count = logits.shape[1]
        tokens = [self._token(place) for place in range(self._end - count + 1, self._end + 1)]
        index = torch.tensor(tokens, device=logits.device)[None, :, None].expand(len(logits), -1, 1)
        return logits.scatter_add(2, index, torch.full_like(index, int(CERTAIN), dtype=logits.dtype))

    def _token(self, position: int) -> int:
        behind = position - self.prompt + 1  # tokens generated, this one included
        right = forced_token(position, self.vocabulary)
        return right + 1 if self.period and behind > 0 and behind % self.period == 0 else right


def forced_token(position: int, vocabulary: int) -> int:
    """The token that belongs at a position, never a special one."""
    return 4 + position * STRIDE % (vocabulary - 8)


def new_model(sizes: dict[str, int], shape: Shape, device: str) -> Any:
    """A Qwen3 of these sizes with random weights, made where it is to run."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    ids = {"vocab_size": shape.vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = Qwen3Config(**sizes, **ids, max_position_embeddings=4096, tie_word_embeddings=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval().requires_grad_(False)


_MODELS: dict[str, Any] = {}


def models_of(shape: Shape, device: str) -> tuple[Any, Any]:
    """Drafter and verifier, made once."""
    if not _MODELS:
        torch.manual_seed(0)
        for role in ("drafter", "verifier"):
            _MODELS[role] = new_model(getattr(shape, role), shape, device)
    return _MODELS["drafter"], _MODELS["verifier"]


# Parts


def run_tests(shape: Shape, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The tests that want a GPU; without one there are none."""
    if options.device == "cpu":
        return {"skipped": "they need a CUDA device"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    left = max(30.0, min(150.0, deadline - time.monotonic()))
    done = subprocess.run(
        [*command, "-o", "addopts=--import-mode=importlib"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=left,
    )
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return {"said": last} | ({} if done.returncode == 0 else {"failed": done.stdout[-3000:]})


def rules() -> dict[str, Rule]:
    """The contestants; dials at which a token that the verifier would never write is deferred."""
    torch.manual_seed(1)
    return {
        "lossless": make_rule("lossless"),
        "opt": make_rule("opt", alpha=-0.5),
        "token_v3": make_rule("token_v3", alpha=0.5),
        "head": learned_rule(GapHead(VERIFY_FEATURES).eval(), -0.5),
    }


def two_logsumexp(drafter: Tensor, verifier: Tensor) -> tuple[Tensor, Tensor]:
    """What a verification cannot do without: the normalisers of both models' logits."""
    return drafter.float().logsumexp(-1), verifier.float().logsumexp(-1)


def run_verification(shape: Shape, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Milliseconds of ``verify_block`` and of the two log normalisers that it cannot do without."""
    device = options.device
    generator = torch.Generator(device).manual_seed(0)
    found: dict[str, Any] = {}
    for batch in BATCHES:
        size = (batch, DRAFTS + 1, shape.vocabulary)
        verifier = 2 * torch.randn(size, device=device, generator=generator, dtype=torch.float32)
        drafter = verifier + 0.5 * torch.randn(size, device=device, generator=generator, dtype=torch.float32)
        drafter, verifier = drafter.to(shape.dtype)[:, :DRAFTS], verifier.to(shape.dtype)
        drafted = {
            0.0: drafter.argmax(-1),
            1.0: drafter.flatten(0, 1)
            .float()
            .softmax(-1)
            .multinomial(1, generator=generator)
            .view(batch, DRAFTS),
        }
        context = Summary({"position": torch.arange(DRAFTS, device=device).expand(batch, -1) + 40})
        calls: dict[str, Callable[[], Any]] = {"two logsumexp": partial(two_logsumexp, drafter, verifier)}
        for name, rule in rules().items():
            for temperature, tokens in drafted.items():
                call = partial(
                    verify_block, rule, tokens, drafter, verifier, context=context, generator=generator
                )
                calls[f"{name} T={temperature:g}"] = partial(call, temperature=temperature)
        times = median_of(calls, 3 if options.small else 15, device)
        found[f"batch {batch}"] = {name: round(1000 * t, 4) for name, t in times.items()}
    return {"milliseconds": found}


def run_decoding(shape: Shape, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Milliseconds a block, share of the models, and whether the text is the forced one, for every contestant."""
    forced = [Forced(model, shape.vocabulary) for model in models_of(shape, options.device)]
    contestants: dict[str, Rule | None] = {**rules(), "assisted": None}
    # transformers assists one row at a time.
    wanted = [
        (b, a, name)
        for b in BATCHES
        for a in ACCEPTED
        for name in contestants
        if b == 1 or name != "assisted"
    ]
    rows: list[dict[str, Any]] = []
    for batch, accepted, name in wanted:
        if time.monotonic() > deadline:
            return {
                "rows": rows,
                "cut": f"the minutes were spent, {len(wanted) - len(rows)} rows are missing",
            }
        forced[0].wrong_every(0 if accepted == DRAFTS else accepted + 1, shape.prompt)
        rows.append(_decode(shape, options.device, batch, accepted, name, contestants[name]))
    for one in forced:
        one.remove()
    return {"rows": rows}


def _decode(
    shape: Shape, device: str, batch: int, accepted: int, name: str, rule: Rule | None
) -> dict[str, Any]:
    """One contestant at one batch size and acceptance.

    A block's time is the difference between a long and a short call over the blocks that the long one has more: the
    prompt's pass and the last blocks, cut short by the end, are in both.
    """
    drafter, verifier = models_of(shape, device)
    ids = torch.tensor([[forced_token(p, shape.vocabulary) for p in range(shape.prompt)]], device=device)
    ids = ids.expand(batch, -1).contiguous()
    common = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    special: dict[str, Any] = {"assistant_model": drafter}
    if rule is None:
        settings = drafter.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = DRAFTS, "constant"
        settings.assistant_confidence_threshold = 0.0
    else:
        special = {"custom_generate": cascade_generate, "drafter": drafter, "rule": rule}
        special["num_draft_tokens"] = DRAFTS

    def call(new: int) -> Tensor:
        with torch.inference_mode():
            return verifier.generate(**common, **special, max_new_tokens=new)

    short = DRAFTS + 1
    long = short + shape.blocks * (accepted + 1)
    text = call(long)[:, shape.prompt :].tolist()  # warms up, too
    wanted = [forced_token(p, shape.vocabulary) for p in range(shape.prompt, shape.prompt + long)]
    found = {}
    for new in (short, long):
        with PassClock(device).on(drafter, verifier) as clock:
            spent = [seconds_of(partial(call, new), device) for _ in range(shape.repetitions)]
            found[new] = (
                statistics.median(spent),
                clock.seconds / shape.repetitions,
                len(clock.spans) / shape.repetitions,
            )
    seconds, within, passes = (a - b for a, b in zip(found[long], found[short]))
    return {
        "contestant": name, "batch": batch, "accepted": accepted,
        "ms_per_block": round(1000 * seconds / shape.blocks, 3), "models": round(within / seconds, 4),
        "passes_per_block": round(passes / shape.blocks, 2), "text_as_forced": all(row == wanted for row in text),
    }  # fmt: skip


def run_collect(shape: Shape, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Tokens a second of ``collect`` with references, and of both models' bare passes over the same texts."""
    from deferral_train.collecting import CollectConfig, collect
    from deferral_train.traces import open_traces

    pair, length = _pair(shape, options.device), 4 * shape.prompt
    texts = [
        " ".join(f"w{(7 * n + 13 * k) % (shape.vocabulary - 8)}" for k in range(length))
        for n in range(shape.sequences)
    ]
    prompts = [Prompt(f"p{n}", text, text) for n, text in enumerate(texts)]
    batch_tokens = 16 * 2 * length
    config = CollectConfig(log_top_k=16, chunk_prompts=32, batch_tokens=batch_tokens)
    ids = torch.tensor([pair.tokenizer(text)["input_ids"] * 2 for text in texts], device=options.device)

    def bare() -> None:
        with torch.inference_mode():
            for part in ids.split(16):
                for model in (pair.drafter, pair.verifier):
                    model(input_ids=part, logits_to_keep=length, use_cache=False)

    with tempfile.TemporaryDirectory() as folder:
        once = Path(folder) / "warm"
        collect(config, once, progress=False, models=pair, prompts=prompts[:16])
        took = seconds_of(
            lambda: collect(config, Path(folder) / "traces", progress=False, models=pair, prompts=prompts),
            options.device,
        )
        tokens = len(open_traces(Path(folder) / "traces"))
    bare()
    alone = seconds_of(bare, options.device)
    rates = {
        "tokens": tokens,
        "collect_per_s": round(tokens / took, 1),
        "bare_per_s": round(tokens / alone, 1),
    }
    return rates | {"over_bare": round(took / alone, 3)}


def _pair(shape: Shape, device: str) -> ModelPair:
    """The models with a tokenizer of as many words as they have tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<s>", "<unk>", *(f"w{n}" for n in range(shape.vocabulary - 4))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    return make_pair(*models_of(shape, device), tokenizer)


def run_fit(shape: Shape, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Seconds of a fit of the default head on traces of a synthetic language, and its regret."""
    from deferral_train.collecting.synthetic import collect_synthetic
    from deferral_train.pairs.synthetic import SyntheticConfig, build_language
    from deferral_train.training.fit import fit

    _MODELS.clear()
    language = build_language(
        SyntheticConfig(vocab_size=12, order=2, verifier_order=2, drafter_order=1, drafter_scale=2.0)
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, count, seed in (("train", 4 * shape.sequences, 1), ("val", shape.sequences, 2)):
            collect_synthetic(language, Path(folder) / name, count, 25, seed=seed, top_k=4, truth=True)
        config = FitConfig(
            train=str(Path(folder) / "train"), val=str(Path(folder) / "val"), epochs=1 if options.small else 5,
            batch_size=256, figure_every=0, accelerator=options.device,
        )  # fmt: skip
        began = time.perf_counter()
        done = fit(config, Path(folder) / "fit")
        took = time.perf_counter() - began
    return {
        "seconds_of_fit": round(took, 2),
        "epochs": done.epochs,
        "regret": round(done.metrics["regret"], 5),
    }


PARTS: dict[str, Callable[[Shape, argparse.Namespace, float], dict[str, Any]]] = {
    "verification": run_verification,
    "decoding": run_decoding,
    "collect": run_collect,
    "fit": run_fit,
    "tests": run_tests,
}


def table(result: dict[str, Any]) -> str:
    """Everything as one table."""
    lines = []
    for name, part in result["parts"].items():
        said = [word for word in ("failed", "skipped", "cut") if word in part]
        lines += [f"{name:<14} {word}: {str(part[word])[:100]}" for word in said]
        for batch, times in part.get("milliseconds", {}).items():
            base = times["two logsumexp"]
            for rule, value in times.items():
                lines.append(
                    f"{name:<14} {batch:<9} {rule:<16} {value:>9.3f} ms  {value / base:>6.2f} x two logsumexp"
                )
        for row in part.get("rows", ()):
            right = "" if row["text_as_forced"] else "  TEXT IS NOT AS FORCED"
            lines.append(
                f"{name:<14} batch {row['batch']:<3} accepted {row['accepted']}  {row['contestant']:<10} "
                f"{row['ms_per_block']:>9.3f} ms a block  models {row['models']:.3f}  "
                f"passes {row['passes_per_block']:.2f}{right}"
            )
        rest = {
            k: v
            for k, v in part.items()
            if k not in ("milliseconds", "rows", "failed", "skipped", "cut", "seconds")
        }
        if rest:
            lines.append(f"{name:<14} " + ", ".join(f"{key} {value}" for key, value in rest.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
