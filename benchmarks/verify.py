"""Verification of a drafted block against what it cannot do without: the log normaliser of both inputs.

    python -m benchmarks.verify                       # 16 rows, 5 drafts, V = 151,936, float32, CPU
    python -m benchmarks.verify --device cuda
    python -m benchmarks.verify --out results.json

Times are medians of interleaved repetitions in one process; memory is the rise of the process's high-water mark
(CUDA: of the allocator's). Two pairs of inputs: `near` (most drafts are accepted) and `far` (most rows reject).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import begin, finish, flags
from deferral_train.rules import make_rule, verify_block

RULES = {"lossless": {}, "opt": {"alpha": 0.2}, "token_v3": {"alpha": 0.3}}
LIMITS = {"over_logsumexp": 1.3, "straightforward_over": 2.0, "memory_over_input": 1.0}


def main() -> int:
    options = parse()
    begin(options)
    result = {
        "shape": {"batch": options.batch, "drafts": options.drafts, "vocabulary": options.vocabulary},
        "repetitions": options.repetitions,
        "limits": LIMITS,
        "inputs": {kind: measure(kind, options) for kind in ("near", "far")},
    }
    return finish("verify", options, result, table(result))


def parse() -> argparse.Namespace:
    parser = flags(__doc__, threads=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repetitions", type=int, default=9)
    return parser.parse_args()


def measure(kind: str, options: argparse.Namespace) -> dict:
    """Medians, ratios and memory on one pair of inputs."""
    drafted, drafter, verifier = inputs(kind, options)
    calls: dict[str, Callable[[], object]] = {
        "logsumexp whole": lambda: (drafter.logsumexp(-1), verifier.logsumexp(-1)),
        "logsumexp rows": lambda: (by_rows(drafter), by_rows(verifier)),
    }
    for name, parameters in RULES.items():
        rule = make_rule(name, **parameters)
        calls[f"straightforward {name}"] = lambda n=name: straightforward(n, drafted, drafter, verifier)
        calls[f"verify_block {name}"] = lambda r=rule: verify_block(r, drafted, drafter, verifier)
    times = interleaved(calls, options)
    base = min(times["logsumexp whole"], times["logsumexp rows"])
    size = verifier.numel() * verifier.element_size()
    accepted = verify_block(make_rule("lossless"), drafted, drafter, verifier).accepted.double().mean()
    return {
        "milliseconds": {name: 1000 * seconds for name, seconds in times.items()},
        "over_logsumexp": {name: times[f"verify_block {name}"] / base for name in RULES},
        "straightforward_over": {
            name: times[f"straightforward {name}"] / times[f"verify_block {name}"] for name in RULES
        },
        "memory_over_input": {
            name: peak(calls[f"verify_block {name}"], options.device) / size for name in RULES
        },
        "accepted_per_row": float(accepted),
    }


def inputs(kind: str, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Drafted tokens [B, T] drawn from the drafter, and logits [B, T, V], [B, T+1, V]."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch, options.drafts + 1, options.vocabulary)
    verifier = torch.randn(shape, generator=generator) * 4
    spread = 0.3 if kind == "near" else 4.0
    drafter = verifier[:, :-1] + spread * torch.randn(verifier[:, :-1].shape, generator=generator)
    drafted = torch.multinomial(torch.softmax(drafter.flatten(0, 1), -1), 1, generator=generator)
    tensors = (drafted.reshape(shape[0], -1), drafter, verifier)
    return tuple(tensor.to(options.device) for tensor in tensors)  # type: ignore[return-value]


def by_rows(logits: Tensor) -> list[Tensor]:
    """logsumexp of one row at a time, which a cache holds."""
    return [row.logsumexp(-1) for block in logits for row in block]


def straightforward(name: str, drafted: Tensor, drafter: Tensor, verifier: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, then compare: whole distributions, target, acceptance and residual as the equations read."""
    q, p = torch.softmax(drafter, dim=-1), torch.softmax(verifier, dim=-1)
    last, p = p[:, -1], p[:, :-1]
    pi = straightforward_target(name, q, p)
    index = drafted.unsqueeze(-1)
    ratio = (pi.gather(-1, index) / q.gather(-1, index)).squeeze(-1).clamp(max=1.0)
    accepted = (torch.rand_like(ratio) < ratio).long().cumprod(dim=1).sum(dim=1)
    residual = (pi - q).clamp(min=0.0)
    rows = torch.arange(len(drafted), device=drafted.device)
    chosen = residual[rows, accepted.clamp(max=drafted.shape[1] - 1)]
    weights = torch.where((accepted == drafted.shape[1]).unsqueeze(1), last, chosen)
    return accepted, torch.multinomial(weights, 1)


def straightforward_target(name: str, q: Tensor, p: Tensor) -> Tensor:
    """pi [B, T, V] of the rules that are timed."""
    if name == "lossless":
        return p
    top = p.amax(dim=-1, keepdim=True)
    if name == "opt":
        tv = (p - q).clamp(min=0.0).sum(dim=-1, keepdim=True)
        return torch.where(q.amax(dim=-1, keepdim=True) < top - RULES["opt"]["alpha"] * tv, p, q)
    keep = p >= (1 - RULES["token_v3"]["alpha"]) * top
    return torch.where(keep, q, 0.0) + p * torch.where(keep, 0.0, q).sum(dim=-1, keepdim=True)


def interleaved(calls: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that a noisy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(options.repetitions + 1):
        for name, call in calls.items():
            synchronise(options.device)
            start = time.perf_counter()
            call()
            synchronise(options.device)
            if repetition:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes by which the call raises the high-water mark of memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def table(result: dict) -> str:
    """The three ratios per rule and kind of input."""
    lines = [str(result["shape"])]
    for kind, found in result["inputs"].items():
        lines.append(f"{kind}: {found['accepted_per_row']:.2f} drafts accepted per row (lossless)")
        lines += [f"  {name:28s} {ms:9.2f} ms" for name, ms in found["milliseconds"].items()]
        for name in RULES:
            ratios = (found[key][name] for key in LIMITS)
            lines.append("  {:10s} {:.2f}x logsumexp, {:.1f}x faster than straightforward, memory {:.2f} of an input"
                         .format(name, *ratios))  # fmt: skip
    lines.append(f"limits: {json.dumps(result['limits'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
