"""Reading the summary of ten million tokens from page cache, every value touched.

    python -m benchmarks.read_traces                     # 10 million tokens in 160 shards, about 1.1 GB on disk
    python -m benchmarks.read_traces --tokens 1000000

Each repetition opens the folder anew, reads every summary field (sizes and CRC-32 checked) and sums every value.
Also timed: the same with every byte under SHA-256 first (``verify=True``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from deferral_train import provenance
from deferral_train.traces import Chunk, Manifest, TraceWriter, open_traces, prepare_folder

LIMIT_SECONDS = 2.0
ROWS_PER_PROMPT = 125


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), options.tokens, options.shards, options.seed)
        read(folder, False)  # brings the files into the page cache
        times = {
            name: [read(folder, verify) for _ in range(options.repetitions)]
            for name, verify in (("read", False), ("read_verified", True))
        }
        size = open_traces(folder).bytes
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = options.tokens // (options.shards * ROWS_PER_PROMPT) * options.shards * ROWS_PER_PROMPT
    print(
        f"{rows:,} tokens in {options.shards} shards, {size / rows:.1f} bytes/token: summary read and summed in"
    )
    print(f"  {medians['read']:.2f} s (limit {LIMIT_SECONDS} s for 10 million tokens)")
    print(f"  {medians['read_verified']:.2f} s with SHA-256 over every byte first")
    if options.out:
        result = {
            "benchmark": "read_traces",
            "tokens": rows,
            "shards": options.shards,
            "bytes": size,
            "limit_seconds_10m": LIMIT_SECONDS,
            "seconds": medians,
            "all_seconds": times,
            "provenance": provenance.collect({"values": options.seed}),
        }
        provenance.write_json(options.out, result)
        print(f"written: {options.out}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=160)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--folder", help="where to write the traces for a while; default the temporary folder"
    )
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write(folder: Path, tokens: int, shards: int, seed: int) -> None:
    """Summary-only traces of random values."""
    prompts = tokens // (shards * ROWS_PER_PROMPT)
    work = tuple(Chunk(n, seed, (tuple(range(n * prompts, (n + 1) * prompts)),)) for n in range(shards))
    names = tuple(str(n) for n in range(shards * prompts))
    manifest = Manifest(pair={}, prefixes="reference", prompt_ids=names, chunks=work)
    random = np.random.default_rng(seed)
    writer = TraceWriter(str(folder), manifest)
    for chunk in prepare_folder(str(folder), manifest):
        rows = prompts * ROWS_PER_PROMPT
        columns = {name: random.random(rows, dtype=np.float32) * 9 for name in manifest.layout.columns}
        columns["prompt"] = np.repeat(np.array(chunk.prompts), ROWS_PER_PROMPT)
        writer.write(chunk, columns)


def read(folder: str, verify: bool) -> float:
    """Seconds to open, read the whole summary and sum every value of it."""
    start = time.perf_counter()
    summary = open_traces(folder, verify=verify).summary()
    total = sum(float(summary[name].sum()) for name in summary)
    seconds = time.perf_counter() - start
    assert np.isfinite(total)
    assert torch.is_tensor(summary["kl"])
    return seconds


if __name__ == "__main__":
    sys.exit(main())
