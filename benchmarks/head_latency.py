"""Microseconds of one head call: eager, compiled, ONNX Runtime; and its share of a verifier pass.

    python -m benchmarks.head_latency [--shared ../shared] [--no-compile] [--out FILE]

From raw columns to the gap, at batch 1, 5 and 256, one thread. The verifier pass is one decoder call over
five drafted tokens and the bonus position of the T5 verifier, encoder not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from benchmarks.common import SHARED, begin, finish, flags
from deferral_train.heads import (
    CostSensitiveHead,
    DeferralHead,
    GapHead,
    PlugInHead,
    TokenHead,
    TruthMixtureHead,
)
from deferral_train.heads.cost import call_inputs
from deferral_train.heads.onnx import export_onnx, open_session
from deferral_train.training.config import VERIFY_FEATURES

BATCHES = (1, 5, 256)
SERVED = ("drafter_max", "verifier_max", "verifier_at_drafter_argmax", "tv")


def heads() -> dict[str, DeferralHead]:
    torch.manual_seed(0)
    return {
        "gap, 4 features, linear": GapHead(SERVED, body="linear"),
        "gap, 4 features, 32x32": GapHead(SERVED, hidden=(32, 32)),
        "gap, default features, 64x64": GapHead(VERIFY_FEATURES),
        "gap, default features, 64x64, isotonic": GapHead(VERIFY_FEATURES, recalibration="isotonic"),
        "cost_sensitive, default features, 64x64": CostSensitiveHead(VERIFY_FEATURES),
        "truth_mixture, default features, linear": TruthMixtureHead(VERIFY_FEATURES, body="linear"),
        "truth_mixture, default features, 16": TruthMixtureHead(VERIFY_FEATURES, hidden=(16,)),
        "token, default features, linear": TokenHead(VERIFY_FEATURES, body="linear"),
        "plug_in": PlugInHead(),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """Median over blocks of at least 0.2 s."""
    timer = Timer("call()", globals={"call": call}, num_threads=1)
    return 1e6 * timer.blocked_autorange(min_run_time=0.2).median


def latencies(head: DeferralHead, compiled: bool) -> dict[str, dict[int, float]]:
    head = head.eval()
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(export_onnx(head, Path(folder) / "model.onnx"))
    fast = torch.compile(head, dynamic=True) if compiled else None
    found: dict[str, dict[int, float]] = {"eager": {}, "onnx": {}} | ({"compiled": {}} if compiled else {})
    for batch in BATCHES:
        x = torch.rand(batch, head.inputs.width)
        inputs = call_inputs(head, x)
        feed = {port.name: value.numpy() for port, value in zip(session.get_inputs(), inputs)}
        with torch.inference_mode():
            found["eager"][batch] = microseconds(partial(head, *inputs))
            if fast is not None:
                found["compiled"][batch] = microseconds(partial(fast, *inputs))
        found["onnx"][batch] = microseconds(partial(session.run, None, feed))
    return found


def verifier_pass(shared: Path) -> float | None:
    """Microseconds of one decoder call over six positions; None where the pair is absent."""
    folder = shared / "models" / "multi30k-en-de" / "verifier"
    if not folder.is_dir():
        return None
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    encoded = model.get_encoder()(input_ids=torch.randint(3, 100, (1, 20)))
    tokens = torch.randint(3, 100, (1, 6))
    with torch.inference_mode():
        return microseconds(lambda: model(encoder_outputs=encoded, decoder_input_ids=tokens))


def main() -> int:
    parser = flags(__doc__, devices=("cpu",))
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    begin(options)
    whole = verifier_pass(options.shared)
    results, lines = {}, []
    for name, head in heads().items():
        results[name] = latencies(head, not options.no_compile)
        for way, times in results[name].items():
            cells = "  ".join(f"batch {b}: {t:8.1f} us" for b, t in times.items())
            share = f"  (batch 5: {times[5] / whole:.2%} of a verifier pass)" if whole else ""
            lines.append(f"{name:<42}{way:<10}{cells}{share}")
    lines.append(f"verifier pass: {whole:.0f} us" if whole else "verifier pass: no pair here, not measured")
    result = {"microseconds": results, "verifier_pass_us": whole}
    return finish("head_latency", options, result, "\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())
