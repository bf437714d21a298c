"""Rows per second of fitting a head: Lightning with its loader and metrics against a bare torch loop.

    python -m benchmarks.fit_speed [--rows 2000000] [--batch 8192] [--threads 1] [--out FILE]

Real columns of the synthetic language are tiled to ``--rows``. Both loops train the same head (about 10k
parameters) on preloaded columns with the same batches, AdamW and schedule-free; the ratio is what counts.
The time of an epoch on 10 million rows is reported as measured where ``--rows`` is that, else extrapolated
and so labelled.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from deferral_train import provenance
from deferral_train.collecting.synthetic import collect_synthetic
from deferral_train.heads import GapHead
from deferral_train.heads.objectives import OBJECTIVES
from deferral_train.pairs.synthetic import SyntheticConfig, build_language
from deferral_train.training.config import VERIFY_FEATURES
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.fit import quiet_lightning
from deferral_train.training.module import DeferralModule

HIDDEN = (96, 80)  # about 10k parameters with the default features
TARGET_ROWS = 10_000_000


def make_data(folder: Path, rows: int, batch: int) -> tuple[TraceDataModule, GapHead]:
    """Prepared data whose fit table is tiled to ``rows``, and a fresh head."""
    language = build_language(SyntheticConfig(vocab_size=32, order=2, verifier_order=2, drafter_order=1))
    for name, texts, seed in (("train", 400, 1), ("val", 50, 2)):
        collect_synthetic(language, folder / name, texts, 50, seed=seed, top_k=0)
    torch.manual_seed(0)
    head = GapHead(VERIFY_FEATURES, hidden=HIDDEN)
    data = TraceDataModule(str(folder / "train"), str(folder / "val"), batch_size=batch)
    data.prepare(head)
    times = -(-rows // len(data.tables["train"]["z"]))
    data.tables["train"] = {k: tiled(v, times)[:rows] for k, v in data.tables["train"].items()}
    return data, head


def tiled(column: Tensor, times: int) -> Tensor:
    return column.repeat(times, *([1] * (column.dim() - 1)))


class Clock(pl.Callback):
    """Seconds, of the clock and of all threads, from the first step's end to the last's; validation not counted."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.start, self.seconds = warmup, 0.0, 0.0
        self.cpu_start, self.cpu_seconds = 0.0, 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        if index == self.warmup:
            self.start, self.cpu_start = time.perf_counter(), time.process_time()
        self.seconds = time.perf_counter() - self.start
        self.cpu_seconds = time.process_time() - self.cpu_start


def lightning_rows_per_second(data: TraceDataModule, head: GapHead, warmup: int) -> tuple[float, float]:
    """Rows a second, and processor seconds per million rows (what a busy machine cannot distort much)."""
    clock = Clock(warmup)
    module = DeferralModule(head, schedule="constant", figure_every=0)
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=1, logger=False, callbacks=[clock], accelerator="cpu", enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, deterministic=True,
        )  # fmt: skip
        trainer.fit(module, data)
    steps = len(data.train_dataloader()) - 1 - warmup
    rows = steps * data.batch_size
    return rows / clock.seconds, 1e6 * clock.cpu_seconds / rows


def bare_rows_per_second(data: TraceDataModule, head: GapHead, warmup: int) -> float:
    """The loop one would write by hand: permutation, index_select, loss, step."""
    table, size = data.tables["train"], data.batch_size
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    generator, start, done = torch.Generator(), 0.0, 0
    order = torch.randperm(len(table["z"]))
    for number, at in enumerate(range(0, len(order), size)):
        index = order[at : at + size]
        batch = {name: column.index_select(0, index) for name, column in table.items()}
        optimizer.zero_grad()
        OBJECTIVES["squared"](head, batch, generator).backward()
        optimizer.step()
        if number == warmup:
            start = time.perf_counter()
        done = number - warmup
    return done * size / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        data, head = make_data(Path(folder), options.rows, options.batch)
        runs = []
        for _ in range(options.repeats):  # in turn, so that a busy machine slows both
            bare = bare_rows_per_second(data, head, 5)
            rate, cpu = lightning_rows_per_second(data, head, 5)
            runs.append((rate, bare, cpu))
            print(
                f"lightning {rate:,.0f} rows/s ({cpu:.2f} processor s a million), bare loop {bare:,.0f} rows/s",
                flush=True,
            )
    ratios = sorted(rate / bare for rate, bare, _ in runs)
    best = max(rate for rate, _, _ in runs)
    record = {
        "rows": options.rows, "batch": options.batch, "threads": options.threads, "parameters": head.num_parameters,
        "runs": runs, "median_ratio": ratios[len(ratios) // 2],
        "epoch_10M_seconds": TARGET_ROWS / best, "extrapolated": options.rows != TARGET_ROWS,
        "processor_seconds_10M": 10 * min(cpu for *_, cpu in runs),
    }  # fmt: skip
    label = " (extrapolated)" if record["extrapolated"] else ""
    print(f"{head.num_parameters} parameters: median ratio {record['median_ratio']:.3f} (target 0.8); "
          f"10M rows in {record['epoch_10M_seconds']:.1f} s{label} (target 60), "
          f"{record['processor_seconds_10M']:.1f} processor s")  # fmt: skip
    if options.out:
        provenance.write_json(options.out, {**record, "provenance": provenance.collect({"seed": 0})})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
