"""ONNX form of a head: one file with a dynamic batch, from raw columns to outputs; checked against torch.

Recalibration, transforms and normalisation are inside the graph, so a server feeds the summary's numbers as
they are, in the order that the graph's metadata states.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError, MissingExtraError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.cost import call_inputs
from deferral_train.provenance import write_bytes

BOUND = 1e-6
OUTPUTS = ("gap", "tv", "reject", "truth", "score")


class _Flat(nn.Module):
    """Wrapper that gives a head's outputs as a tuple, as the exporter needs."""

    def __init__(self, head: DeferralHead, names: Sequence[str]) -> None:
        super().__init__()
        self.head, self.names = head, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.head(*inputs)
        return tuple(out[name] for name in self.names)


def export_onnx(head: DeferralHead, path: str | Path) -> Path:
    """Write ``head`` as one ONNX file; needs the onnx extra.

    Inputs: ``columns`` float32 [N, C] (and ``alpha`` [N] for a cost-sensitive head). Outputs ``[N]`` by
    name. The file's metadata holds the head's config and the names of the columns.
    """
    onnx = _module("onnx")
    _module("onnxscript")
    head = head.cpu().eval()
    example = call_inputs(head, torch.full((2, head.inputs.width), 0.5))
    with torch.no_grad():
        names = [name for name in OUTPUTS if name in head(*example)]
    batch = torch.export.Dim("batch", min=1)
    with _quiet_exporter():
        program = torch.onnx.export(
            _Flat(head, names).eval(),
            example,
            input_names=["columns", "alpha"][: len(example)],
            output_names=names,
            dynamic_shapes=(tuple({0: batch} for _ in example),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    described = {"columns": head.inputs.names, "widths": head.inputs.widths, "config": head.config}
    for key, value in described.items():
        onnx.helper.set_model_props(model, {**_props(model), f"deferral.{key}": json.dumps(value)})
    path = Path(path)
    write_bytes(path, model.SerializeToString())
    return path


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Context that mutes the exporter's notes about torchvision, which no head uses, and about torch itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            warnings.filterwarnings("ignore", message=r".*The axis name: batch will not be used.*")
            yield
    finally:
        logger.setLevel(level)


def _props(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


@dataclass(frozen=True)
class Parity:
    """Greatest difference between torch and ONNX Runtime on ``rows`` rows in one call.

    Absolute where torch's value is at most 1 in size, as gaps of bounded losses are; relative above, where float32
    itself resolves no better (nats of a log gap, scores).
    """

    rows: int
    error: float
    bound: float = BOUND

    def line(self) -> str:
        """One line for the console."""
        return f"ONNX against torch, batch {self.rows}: max error {self.error:.2e} (bound {self.bound:g})"

    def check(self) -> None:
        """Raise InputError where the bound is exceeded."""
        if not self.error <= self.bound:
            raise InputError(f"{self.line()}: too large; serve the safetensors form instead")


def parity(head: DeferralHead, path: str | Path, columns: Tensor) -> list[Parity]:
    """Load the file back and compare on rows of real ``columns [N, C]``: one at a time, and all at once."""
    session = open_session(path)
    single = max(_difference(head, session, columns[i : i + 1]) for i in range(min(64, len(columns))))
    return [Parity(1, single), Parity(len(columns), _difference(head, session, columns))]


def open_session(path: str | Path) -> Any:
    """ONNX Runtime session on one CPU thread."""
    runtime = _module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _difference(head: DeferralHead, session: Any, columns: Tensor) -> float:
    inputs = call_inputs(head, columns)
    feed = {port.name: value.numpy() for port, value in zip(session.get_inputs(), inputs)}
    found = session.run(None, feed)
    with torch.no_grad():
        wanted = head(*inputs)
    names = [port.name for port in session.get_outputs()]
    return max(_error(torch.from_numpy(value), wanted[name]) for name, value in zip(names, found))


def _error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).abs() / wanted.abs().clamp_min(1)).max())


def _module(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise MissingExtraError(name, "onnx") from None
