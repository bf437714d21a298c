"""`deferral-train export`: a training checkpoint as a folder that others can load and serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deferral_train.errors import InputError

if TYPE_CHECKING:
    from deferral_train.heads.base import DeferralHead


@dataclass(frozen=True)
class ExportConfig:
    """Write config.json, model.safetensors, README.md (and model.onnx) for a fitted head.

    Attributes:
        checkpoint: Lightning checkpoint of ``fit``, or a head folder to export anew.
        out: head folder to write.
        alpha: operating point to store; ``choose`` stores a certified one.
        threshold: the same for a judge head: theta of rule judge, or h of the acceptance stop.
        onnx: also write model.onnx, one file with dynamic batch, compared with torch on ``traces``.
        traces: trace folder for the ONNX comparison; required with ``onnx``.
        push_to_hub: repository ``owner/name`` to upload the folder to.
        token: access token for the upload; without it the stored login is used.
        head_class: class of the head where it is your own, as ``fit`` named it: my_heads.MyHead.
    """

    checkpoint: str
    out: str
    alpha: float | None = None
    threshold: float | None = None
    onnx: bool = False
    traces: str | None = None
    push_to_hub: str | None = None
    token: str | None = None
    head_class: str | None = None


# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = ExportConfig


def run(config: ExportConfig) -> int:
    """Read the head, and write its folder under a lock; then the graph and the upload where they were asked for."""
    from deferral_train.heads.artifact import foreign_files
    from deferral_train.heads.base import DeferralHead
    from deferral_train.heads.export import export_head
    from deferral_train.heads.export import push_to_hub as upload
    from deferral_train.heads.own import import_head_class
    from deferral_train.provenance import one_writer

    if config.onnx and config.traces is None:
        raise InputError("--onnx needs --traces: the exported graph is compared with torch on real rows")
    own = None if config.head_class is None else import_head_class(config.head_class)
    if Path(config.checkpoint).is_dir():
        head = (own or DeferralHead).from_pretrained(config.checkpoint)
    else:
        from deferral_train.training.checkpoint import read_checkpoint

        head, _ = read_checkpoint(config.checkpoint, own)
    out, point = config.out, config.alpha if config.alpha is not None else config.threshold
    with one_writer(out, "export"):
        lost = _lost_certificate(out, head, point)
        export_head(head, out, config.alpha, config.threshold)
        print(f"{head.head_type} head, {head.num_parameters} parameters: {out}")
        if lost is not None:
            print(
                f"the certificate that {out} held ({lost}) was of another head or setting, and is gone; choose anew"
            )
        if others := foreign_files(out):
            print(
                f"kept what is not of this head: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}"
            )
        if config.onnx:
            _onnx(head, out, str(config.traces))
    if config.push_to_hub is not None:
        print(upload(head, out, config.push_to_hub, config.token))
    return 0


def _lost_certificate(out: str, head: DeferralHead, point: float | None) -> str | None:
    """The certificate of the head in ``out``, in a few words, where exporting ``head`` takes it away."""
    from deferral_train.heads.artifact import CONFIG, current_file
    from deferral_train.heads.config import read_config

    try:
        before = read_config(current_file(Path(out), CONFIG)).get("certificate")
    except InputError:
        return None
    if not isinstance(before, dict) or (point is None and head.metadata.get("certificate") == before):
        return None
    return ", ".join(f"{name} {before[name]}" for name in ("metric", "limit", "value") if name in before)


def _onnx(head: object, out: str, traces: str) -> None:
    from deferral_train.heads.base import DeferralHead
    from deferral_train.heads.onnx import export_onnx, parity
    from deferral_train.traces import open_traces

    assert isinstance(head, DeferralHead)
    path = export_onnx(head, Path(out) / "model.onnx")
    columns = head.columns(open_traces(traces).summary(list(head.features)))
    for report in parity(head, path, columns):
        print(report.line())
        report.check()
