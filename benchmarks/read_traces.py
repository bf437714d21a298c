"""Reading the summary of ten million tokens from page cache, every value touched.

    python -m benchmarks.read_traces                     # 10 million tokens in 160 shards, about 1.1 GB on disk
    python -m benchmarks.read_traces --tokens 1000000

Each repetition opens the folder anew, checks the size of every file and the CRC-32 of every column, copies every
summary field of every row into a tensor, and sums every value: nothing is kept from the repetition before but the page
cache. Also timed, in turn: the same with SHA-256 over every byte of the files first (``verify=True``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import begin, finish, flags
from deferral_train.traces import Chunk, Manifest, TraceWriter, open_traces, prepare_folder
from deferral_train.traces.reader import READERS
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS

LIMIT_SECONDS = 2.0
ROWS_PER_PROMPT = 125


def main() -> int:
    options = parse()
    begin(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), options.tokens, options.shards, options.seed)
        read(folder, False)  # brings the files into the page cache
        times: dict[str, list[tuple[float, float]]] = {"read": [], "read_verified": []}
        for _ in range(options.repetitions):
            for name, seconds in times.items():
                seconds.append(read(folder, verify=name == "read_verified"))
        size = open_traces(folder).bytes
    wall, cpu = (
        {name: statistics.median(t[way] for t in seconds) for name, seconds in times.items()}
        for way in (0, 1)
    )
    rows = options.tokens // (options.shards * ROWS_PER_PROMPT) * options.shards * ROWS_PER_PROMPT
    result = {
        "tokens": rows,
        "shards": options.shards,
        "bytes": size,
        "limit_seconds_10m": LIMIT_SECONDS,
        "seconds": wall,
        "cpu_seconds": cpu,
        "all_seconds": {name: [t[0] for t in seconds] for name, seconds in times.items()},
    }
    lines = [
        f"{rows:,} tokens in {options.shards} shards, {size / rows:.1f} bytes/token, {READERS} reading threads"
    ]
    lines += [
        f"  {wall[name]:.2f} s (CPU {cpu[name]:.2f} s) {what}"
        for name, what in (
            (
                "read",
                f"summary read and summed, CRC-32 of every value checked (limit {LIMIT_SECONDS} s at 10 million)",
            ),
            ("read_verified", "with SHA-256 over every byte of the files first"),
        )
    ]
    return finish("read_traces", options, result, "\n".join(lines))


def parse() -> argparse.Namespace:
    parser = flags(__doc__, devices=("cpu",))
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=160)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--folder", help="where to write the traces for a while; default the temporary folder"
    )
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


def read(folder: str, verify: bool) -> tuple[float, float]:
    """Wall and CPU seconds to open, read the whole summary and sum every value of it."""
    start = time.perf_counter(), time.process_time()
    summary = open_traces(folder, verify=verify).summary()
    total = sum(float(summary[name].sum()) for name in summary)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    assert np.isfinite(total)
    assert set(SUMMARY_COLUMNS) | set(TOKEN_COLUMNS) <= set(summary)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
