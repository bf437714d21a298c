"""Random command lines and corrupted inputs for collect, fit and train-pair; nothing but one line may come out.

    python -m fuzz.commands_training --seconds 120 [--only collect fit train-pair] [--seed 0]

As `fuzz.commands` does it for the commands that read finished work: every case is a good call on small real inputs
(a tiny pair, prompts in every kind of file, traces, a checkpoint, text), damaged in one to three places. A case that
raises, prints more than a line of error, or returns anything but 0 or 2 is a finding, and its seed makes it again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pandas
import torch
from fuzz.commands import call, damage, damaged_words, fault
from tiny_models import WORDS as VOCABULARY
from tiny_models import save_tiny_pair
from training.trace_maker import small_language, write_traces

SLOW = 60  # seconds that a case may take
COMMANDS = ("collect", "fit", "train-pair")
PROMPTS = (
    "prompts.jsonl",
    "prompts.csv",
    "prompts.tsv",
    "prompts.parquet",
    "prompts.txt",
    "prompts.jsonl.gz",
)
LINES = {
    "collect": "--drafter drafter --verifier verifier --out collected --log-top-k 4 --device cpu --progress false",
    "fit": "--model.head.class_path GapHead --model.head.init_args.features [drafter_max:logit,tv] --data.train fit "
    "--data.val val --trainer.max_epochs 1 --trainer.enable_progress_bar false --model.figure_every 0 "
    "--data.batch_size 200 --out fitted",
    "train-pair": "--out pair --pair.text.files [text.txt] --pair.vocab_size 320 --pair.context 16 "
    "--pair.verifier.layers 1 --pair.verifier.width 16 --pair.verifier.heads 2 --pair.verifier.feed_forward 16 "
    "--pair.drafter.layers 1 --pair.drafter.width 16 --pair.drafter.heads 2 --pair.drafter.feed_forward 16 "
    "--pair.verifier_schedule.steps 2 --pair.verifier_schedule.batch 2 --pair.drafter_schedule.steps 2 "
    "--pair.drafter_schedule.batch 2 --min-nats=-100 --min-cost-ratio 0",
}
MORE = {
    "collect": (
        "--prefixes verifier --max-new-tokens 3", "--prefixes cascade --rule opt:alpha=0.2 --max-new-tokens 3",
        "--hidden both", "--limit 3", "--chunk-prompts 2", "--temperature 0", "--prompt-field prompt", "--chat on",
        "--template x:{prompt}", "--dtype bfloat16", "--max-bytes 100", "--labels selfjudge", "--teacher verifier",
        "--reference-path prompts.txt", "--prompt-format csv", "--max-prompt-tokens 2", "--max-new-tokens 900",
    ),
    "fit": (
        "--ckpt_path last.ckpt", "--trainer.max_steps 2", "--trainer.logger false", "--trainer.precision 16-mixed",
        "--trainer.limit_val_batches 0", "--trainer.barebones true", "--trainer.overfit_batches 1", "--model.lr 1e9",
        "--data.truth exact", "--data.truth acceptance", "--data.temperature 0.5", "--model.objective cost_sensitive",
        "--model.head.class_path TokenHead", "--model.head.init_args.hidden [4]", "--data.val_fraction 0.2",
        "--trainer.accumulate_grad_batches 3", "--trainer.fast_dev_run 1", "--model.schedule linear", "--patience 0",
        "--trainer.val_check_interval 1", "--data.pair_training ids.json", "--model.head.init_args.stage draft",
    ),
    "train-pair": (
        "--pair.kind t5", "--pair.text.limit 3", "--pair.text.heldout [text.txt]", "--pair.text.targets [text.txt]",
        "--min-nats 5", "--pair.vocab_size 3", "--pair.context 0", "--pair.seed 1", "--pair.text.files [prompts.jsonl]",
    ),
}  # fmt: skip
READS = {
    "collect": (*PROMPTS, "drafter", "verifier", "collected"),
    "fit": ("fit", "val", "last.ckpt", "fitted"),
    "train-pair": ("text.txt", "prompts.jsonl", "pair"),
}


def make_world(folder: Path) -> None:
    """Small real inputs, and what each command wrote on a first call."""
    torch.manual_seed(0)
    save_tiny_pair("llama", folder)
    rows = [{"id": f"p{i}", "prompt": f"w{i} w{i + 1} w2", "reference": "w1 w2"} for i in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines)
    (folder / "prompts.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8-sig")))
    (folder / "prompts.txt").write_text("".join(row["prompt"] + "\n" for row in rows))
    frame = pandas.DataFrame(rows)
    frame.to_csv(folder / "prompts.csv", index=False)
    frame.to_csv(folder / "prompts.tsv", index=False, sep="\t")
    frame.to_parquet(folder / "prompts.parquet")
    random = Random(0)
    text = [" ".join(random.choices(VOCABULARY, k=9)) for _ in range(3000)]
    (folder / "text.txt").write_text("\n".join(text) + "\n")
    for name, seed in (("fit", 1), ("val", 2)):
        write_traces(folder / name, small_language(), 30, 10, seed)
    for command in COMMANDS:
        words = good_words(command, Random(0))
        code, said = call(words, folder)
        if code != 0:
            raise RuntimeError(f"the world cannot be made by {words}: {said}")
    shutil.copy(folder / "fitted" / "checkpoints" / "last.ckpt", folder / "last.ckpt")


def good_words(command: str, random: Random) -> list[str]:
    """A call that works on an undamaged world."""
    prompts = ["--prompts", random.choice(PROMPTS) if random.random() < 0.5 else PROMPTS[0]]
    return [command, *LINES[command].split(), *(prompts if command == "collect" else [])]


def case(seed: int, world: Path, scratch: Path, only: tuple[str, ...]) -> list[str]:
    """Prepare ``scratch`` and return the command line of a seed."""
    random = Random(seed)
    command = random.choice(only)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(world, scratch)
    words = good_words(command, random)
    for _ in range(random.choice((0, 0, 1, 2))):
        words += random.choice(MORE[command]).split()
    if random.random() < 0.5:
        shutil.rmtree(
            scratch / {"collect": "collected", "fit": "fitted", "train-pair": "pair"}[command],
            ignore_errors=True,
        )
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.6:
            damage(random, scratch / random.choice(READS[command]))
        else:
            words = [command, *damaged_words(random, words[1:])]
    return words


def problem(
    seed: int, world: Path, scratch: Path, only: tuple[str, ...] = COMMANDS
) -> tuple[list[str], str | None]:
    """The command line of a seed, and what is wrong with how it was answered; None where nothing is."""
    words = case(seed, world, scratch, only)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    return words, fault(words, scratch, SLOW)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    tried: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-training-") as folder:
        world, scratch = Path(folder) / "world", Path(folder) / "scratch"
        world.mkdir()
        make_world(world)
        end, seed = time.monotonic() + options.seconds, options.seed
        while time.monotonic() < end:
            words, wrong = problem(seed, world, scratch, tuple(options.only))
            tried[words[0]] += 1
            if wrong is not None and wrong.partition(":")[0] not in {
                known.partition(":")[0] for known in found
            }:
                found[wrong] = seed
                print(f"FINDING seed {seed}: {wrong}\n    {' '.join(words)[:400]}", flush=True)
            seed += 1
    print(json.dumps({"cases": dict(tried), "findings": len(found)}))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
