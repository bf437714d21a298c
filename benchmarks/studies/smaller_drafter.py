"""A drafter below the shared pair's own: a T5 of 1 + 1 layers and width 32 over the same tokenizer, trained on what
the pair was trained on (lines 1-23,000 of Multi30k's training part), half on the text and half on the verifier's
distribution. Writes a checkpoint with tokenizer.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.smaller_drafter --out runs/smaller
"""

from __future__ import annotations

import copy
import gzip
import random
import time
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.common import SHARED, bare_parser

LINES, WIDTH, BATCH = 23_000, 32, 48


def main() -> int:
    parser = bare_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    train(options.out, options.epochs, options.seed)
    return 0


def train(out: Path, epochs: int, seed: int) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = SHARED / "models" / "multi30k-en-de"
    tokenizer = AutoTokenizer.from_pretrained(folder / "verifier")
    verifier = AutoModelForSeq2SeqLM.from_pretrained(folder / "verifier").eval()
    config = copy.deepcopy(AutoModelForSeq2SeqLM.from_pretrained(folder / "drafter").config)
    config.d_model, config.d_ff, config.num_layers, config.num_decoder_layers = WIDTH, 2 * WIDTH, 1, 1
    model = AutoModelForSeq2SeqLM.from_config(config).train()
    sides = [read(side) for side in ("en", "de")]
    rows = [
        tuple(tokenizer(text.strip()).input_ids for text in pair) for pair in zip(*sides)
    ]  # both end with the end of sequence
    batches = grouped(rows, seed)
    steps = epochs * len(batches)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.05)
    began, shuffle = time.perf_counter(), random.Random(seed)
    for step in range(steps):
        if step % len(batches) == 0:
            shuffle.shuffle(batches)
        source, mask, target = batches[step % len(batches)]
        loss = loss_of(model, verifier, source, mask, target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"step {step}/{steps} loss {float(loss):.3f} {time.perf_counter() - began:.0f} s", flush=True
            )
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"written: {out}, {sum(p.numel() for p in model.parameters()):,} parameters")


def read(side: str) -> list[str]:
    with gzip.open(SHARED / "data" / "multi30k" / f"train.{side}.gz", "rt", encoding="utf-8") as file:
        return [line for _, line in zip(range(LINES), file)]


def grouped(rows: list[tuple[list[int], ...]], seed: int) -> list[tuple[torch.Tensor, ...]]:
    """Batches of like length: source ids, their mask, target ids (-100 = padding)."""
    noise = random.Random(seed)
    order = sorted(rows, key=lambda row: len(row[1]) + noise.random())
    return [batch_of(order[start : start + BATCH]) for start in range(0, len(order), BATCH)]


def batch_of(rows: list[tuple[list[int], ...]]) -> tuple[torch.Tensor, ...]:
    sources, targets = (padded([row[side] for row in rows], -100) for side in (0, 1))
    return sources.clamp(min=0), (sources >= 0).long(), targets


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def loss_of(model, verifier, source, mask, target) -> torch.Tensor:
    """Half the text's cross entropy, half the verifier's."""
    arguments = {"input_ids": source, "attention_mask": mask, "labels": target}
    with torch.no_grad():
        distribution = torch.softmax(verifier(**arguments).logits, dim=-1)
    output = model(**arguments)
    inside = target >= 0
    logprobs = functional.log_softmax(output.logits[inside], dim=-1)
    return 0.5 * output.loss - 0.5 * (distribution[inside] * logprobs).sum(dim=-1).mean()


if __name__ == "__main__":
    raise SystemExit(main())
