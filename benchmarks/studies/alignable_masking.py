"""GRIFFIN's mask in the distillation of an ordinary drafter: does counting what a draft would reach make drafts longer?

    OMP_NUM_THREADS=1 python -m benchmarks.studies.alignable_masking --out OUT.json

A T5 drafter of the shared pair's shape (0.38M parameters) is distilled from the shared pair's verifier on lines
1-23,000 of Multi30k's training part, by `train-pair`'s own loop and the verifier's distribution alone (distil 1):
once counting every position, once with `alignable_top_k` and `draft_window`; same seeds, batches and steps. Judged
on held-out captions under `lossless`, greedy and sampled: tokens per verifier call. Counts, so that a loaded
machine changes nothing. Intervals: 95%, bootstrap over prompts, the drafters of all seeds on the same redraws; they
hold for these drafters, what another seed does is seen in the spread alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import SHARED, begin, finish, flags
from deferral_train.decoding.pair import Pair
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.pairs.load import load_models, make_pair
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.pairs.scratch.batches import PairBatches
from deferral_train.pairs.scratch.models import new_model
from deferral_train.pairs.scratch.optimise import LoopSettings, optimise
from deferral_train.pairs.scratch.train_config import ModelSize, PairConfig, PairText, Schedule

LINES, CONTEXT, DRAFT = 23_000, 48, 5
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def main() -> int:
    parser = flags(__doc__, devices=("cpu",))
    parser.add_argument("--seeds", type=int, default=3, help="drafters of each kind")
    parser.add_argument("--steps", type=int, default=960, help="of 48 pairs; 480 are an epoch")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--top-k", type=int, default=3)
    options = parser.parse_args()
    begin(options)
    text = SHARED / "data" / "multi30k"
    pair = load_models(
        *(SHARED / "models" / "multi30k-en-de" / role for role in ("drafter", "verifier")), device="cpu"
    )
    rows = read_prompts(text / "train.en.gz", reference_path=text / "train.de.gz", limit=LINES)
    batches = encoded(pair.tokenizer, rows)
    prompts = read_prompts(text / "test_2016_flickr.en.gz", limit=options.prompts)
    kinds = {"every position": 0, f"mask, k = {options.top_k}": options.top_k}
    counts: dict[str, list[dict[str, np.ndarray]]] = {kind: [] for kind in kinds}
    for seed in range(options.seed, options.seed + options.seeds):
        for kind, top_k in kinds.items():
            began = time.process_time()
            drafter = distilled(pair, batches, seed, options.steps, top_k)
            counts[kind].append(count(pair, drafter, prompts))
            print(f"seed {seed}, {kind}: {time.process_time() - began:.0f} s of CPU", flush=True)
    result = {
        "steps": options.steps, "batch": 48, "top_k": options.top_k, "draft_window": DRAFT, "seeds": options.seeds,
        "prompts": len(prompts), "num_draft_tokens": DRAFT, "rule": "lossless",
        "lengths": {name: compared(counts, name) for name in TEMPERATURES},
    }  # fmt: skip
    return finish("alignable_masking", options, result, table(result["lengths"]))


def encoded(tokenizer: Any, rows: list[Prompt]) -> Any:
    """The training pairs as batches of a seed."""
    sides = [[row.prompt for row in rows], [row.reference or "" for row in rows]]
    sources, targets = (
        [ids[: CONTEXT - 1] + ids[-1:] if len(ids) > CONTEXT else ids for ids in tokenizer(side)["input_ids"]]
        for side in sides
    )
    return lambda seed: PairBatches(sources, targets, tokenizer.pad_token_id, 48, seed)


def distilled(pair: Any, batches: Any, seed: int, steps: int, top_k: int) -> Any:
    """A drafter of this seed, from scratch."""
    schedule = Schedule(
        steps, 48, 4e-3, embedding_rate=1.0, warmup=70, distil=1.0, alignable_top_k=top_k, draft_window=DRAFT
    )
    config = PairConfig(
        kind="t5", text=PairText(("-",), targets=("-",)), context=CONTEXT, vocab_size=len(pair.tokenizer),
        drafter=ModelSize(1, 64, 2, 192), drafter_schedule=schedule, seed=seed,
    )  # fmt: skip
    model = new_model(config, "drafter", pair.tokenizer)
    with tempfile.TemporaryDirectory() as place:
        settings = LoopSettings(
            Path(place) / "drafter.pt", config.outcome_hash(), seed, checkpoint_seconds=1e9
        )
        optimise(model, batches(seed), schedule, settings, pair.verifier)
    return model.requires_grad_(False)


def count(pair: Any, drafter: Any, prompts: list[Prompt]) -> dict[str, np.ndarray]:
    """Tokens emitted and verifier calls of each prompt, [2, P], by way of decoding."""
    decoding = Pair(make_pair(drafter, pair.verifier, pair.tokenizer))
    found = {}
    for name, temperature in TEMPERATURES.items():
        stats = decoding.generate(
            prompts, "lossless", temperature=temperature, num_draft_tokens=DRAFT, max_new_tokens=CONTEXT, batch_size=32,
            seed=17,
        ).stats  # fmt: skip
        rows = [stats.row(number) for number in range(len(prompts))]
        found[name] = np.array(
            [[row["emitted"] for row in rows], [row["verifier_calls"] for row in rows]], float
        )
    return found


def compared(counts: Mapping[str, list[dict[str, np.ndarray]]], name: str) -> dict[str, Any]:
    """Tokens per verifier call of each kind and seed, and the masked drafter's minus the other's."""
    redraws = PromptBootstrap(next(iter(counts.values()))[0][name].shape[1])

    def length(tokens: np.ndarray) -> tuple[float, np.ndarray]:
        emitted, calls = tokens
        return emitted.sum() / calls.sum(), redraws.sums(emitted) / redraws.sums(calls)

    by_kind = {kind: [length(seed[name]) for seed in seeds] for kind, seeds in counts.items()}
    pairs = list(zip(*by_kind.values()))
    differences = [(b - a, sb - sa) for (a, sa), (b, sb) in pairs]
    mean = (
        sum(value for value, _ in differences) / len(pairs),
        sum(draws for _, draws in differences) / len(pairs),
    )
    return {
        "length": {
            kind: [redraws.interval(*seed).as_dict() for seed in seeds] for kind, seeds in by_kind.items()
        },
        "masked_minus_every": [redraws.interval(*difference).as_dict() for difference in differences],
        "mean_difference": redraws.interval(*mean).as_dict(),
    }


def table(lengths: Mapping[str, Any]) -> str:
    def cell(number: Mapping[str, float]) -> str:
        return f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"

    lines = []
    for name, entry in lengths.items():
        for kind, seeds in entry["length"].items():
            lines.append(f"{name:<8} {kind:<16} " + "  ".join(cell(seed) for seed in seeds))
        lines.append(
            f"{name:<8} {'difference':<16} " + "  ".join(cell(one) for one in entry["masked_minus_every"])
        )
        lines.append(f"{name:<8} {'mean difference':<16} {cell(entry['mean_difference'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
