"""Time of one head call on the exporting machine, microseconds, from raw columns ``[N, C]`` to the outputs."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from deferral_train.heads.base import DeferralHead

BATCHES = (1, 5)  # a token, and a drafted block


def call_inputs(head: DeferralHead, columns: Tensor) -> tuple[Tensor, ...]:
    """Arguments of ``head(...)`` for raw columns ``[N, C]``: these, and alpha ``[N]`` = 0.1 where it is an input."""
    if head.takes_alpha:
        return columns, torch.full_like(columns[:, 0], 0.1)
    return (columns,)


def measure_cost(head: DeferralHead, seconds: float = 0.1) -> dict[str, Any]:
    """Median microseconds of a call by batch size: torch without compilation, one thread of this CPU.

    A card states it with its conditions; the ONNX form is faster (`benchmarks/head_latency.py`).
    """
    from torch.utils.benchmark import Timer

    head = head.cpu().eval()
    found = {}
    for batch in BATCHES:
        inputs = call_inputs(head, torch.full((batch, head.inputs.width), 0.5))
        timer = Timer("head(*inputs)", globals={"head": head, "inputs": inputs}, num_threads=1)
        with torch.inference_mode():
            found[str(batch)] = round(1e6 * timer.blocked_autorange(min_run_time=seconds).median, 2)
    return {
        "microseconds_per_call": found,
        "microseconds_per_token": round(found[str(BATCHES[-1])] / BATCHES[-1], 2),
        "measured": f"torch {torch.__version__}, eager, float32, one CPU thread, calls of {BATCHES[0]} and "
        f"{BATCHES[-1]} rows",
        "processor": platform.processor() or platform.machine(),
    }
