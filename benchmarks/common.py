"""Shared by all benchmarks: flags, the shared pair, the machine's description, and how results leave them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deferral_train import provenance

SHARED = Path(os.environ.get("DEFERRAL_TRAIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def bare_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the module's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def flags(
    doc: str | None, devices: Sequence[str] = ("cpu", "cuda"), threads: int | None = 1
) -> argparse.ArgumentParser:
    """A parser with the flags of a benchmark: ``--device``, ``--out``; where it sets them ``--threads``, ``--seed``.

    Args:
        doc: the module's docstring.
        devices: what the benchmark has a part for, default first.
        threads: of torch, by default; None where the benchmark leaves them and the seed alone.
    """
    parser = bare_parser(doc)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads, help="of torch")
        parser.add_argument("--seed", type=int, default=0)
    return parser


def study_flags(doc: str | None, work: str) -> argparse.ArgumentParser:
    """A parser with the flags of a study: ``--device``, ``--out``, ``--shared`` and ``--work``.

    Args:
        doc: the module's docstring.
        work: folder for what a study keeps from one run to the next, by default.
    """
    parser = flags(doc, ("cpu",), threads=None)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the shared pair and its text")
    parser.add_argument("--work", type=Path, default=Path(work), help="kept from one run to the next")
    return parser


def keep(
    options: argparse.Namespace, result: Mapping[str, Any], seeds: Mapping[str, int] | None = None
) -> None:
    """With ``--out``, write the result with its provenance."""
    if options.out:
        record = provenance.collect(dict(seeds or {}))
        provenance.write_json(options.out, {**result, "provenance": record})
        print(f"written: {options.out}")


def begin(options: argparse.Namespace) -> None:
    """Set torch's threads; ends the process with 2 where the device is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing was run", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(options.threads)


def finish(name: str, options: argparse.Namespace, result: Mapping[str, Any], text: str) -> int:
    """Print the table; with ``--out`` write the result with device, threads and provenance. Returns exit status 0."""
    where = {"device": device_name(options.device), "threads": options.threads, "cores": os.cpu_count()}
    print(f"{name} on {where['device']}, {where['threads']} torch thread(s), {where['cores']} cores\n{text}")
    keep(options, {"benchmark": name, **where, **result}, {"seed": options.seed})
    return 0


def device_name(device: str) -> str:
    """Name of the GPU or the CPU, as it gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
