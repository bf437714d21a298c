"""`deferral-train doctor`: what this machine, pair, trace folder and head can and cannot do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deferral_train.errors import InputError


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; ``level`` is "ok", "note" or "no"."""

    level: str
    subject: str
    text: str


def run(
    drafter: str | None = None,
    verifier: str | None = None,
    traces: str | None = None,
    head: str | None = None,
    folder: str = ".",
) -> int:
    """Say what this machine, a pair, a trace folder and a head can and cannot do.

    Args:
        drafter: drafter checkpoint folder or hub id; with ``verifier``, checks that the two make a pair.
        verifier: verifier checkpoint folder or hub id.
        traces: trace folder; every shard's checksum is verified.
        head: exported head folder.
        folder: where outputs would be written; its free space is reported.

    Returns:
        0, or 2 where something named above cannot be used.
    """
    findings = [*machine(Path(folder))]
    if drafter is not None or verifier is not None:
        findings += _guard("pair", lambda: pair(drafter, verifier))
    if traces is not None:
        findings += _guard("traces", lambda: trace_folder(traces))
    if head is not None:
        findings += _guard("head", lambda: head_folder(head))
    for finding in findings:
        print(f"{finding.level:>4}  {finding.subject:<11} {finding.text}")
    return 2 if any(finding.level == "no" for finding in findings) else 0


def machine(folder: Path) -> Iterator[Finding]:
    """Python, torch and its device, memory, disk, threads, package versions."""
    import torch

    from deferral_train import provenance

    yield Finding("ok", "python", f"{sys.version.split()[0]} ({sys.executable})")
    yield _device(torch.version.cuda, torch.cuda.is_available(), torch.__version__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    yield Finding(
        "note" if threads > cores else "ok",
        "threads",
        f"{threads} torch threads on {cores} cores"
        + ("; more threads than cores is slow, set OMP_NUM_THREADS" if threads > cores else ""),
    )
    yield _memory()
    yield _disk(folder)
    known = provenance.versions()
    yield Finding("ok", "packages", ", ".join(f"{name} {known[name]}" for name in known if name != "python"))
    missing = [name for name in ("transformers", "pytorch-lightning", "torchmetrics") if name not in known]
    if missing:
        yield Finding(
            "note", "packages", f"{', '.join(missing)} not installed: pip install 'deferral-train[train]'"
        )


def _device(cuda: str | None, available: bool, version: str) -> Finding:
    """A GPU beside a CPU-only torch is the commonest way to lose a day."""
    if available:
        import torch

        properties = torch.cuda.get_device_properties(0)
        size = properties.total_memory / 2**30
        return Finding("ok", "torch", f"{version} on {properties.name}, {size:.0f} GiB")
    if has_nvidia_gpu() and cuda is None:
        return Finding(
            "note",
            "torch",
            f"{version} is a CPU-only build, but this machine has an NVIDIA GPU; "
            "reinstall with: make TORCH_INDEX=https://download.pytorch.org/whl/cu130",
        )
    if has_nvidia_gpu():
        return Finding(
            "note", "torch", f"{version} sees no CUDA device although a GPU is present: check its driver"
        )
    return Finding("ok", "torch", f"{version} on CPU (no GPU found)")


def has_nvidia_gpu() -> bool:
    """True where the operating system shows an NVIDIA GPU; asked without torch."""
    return Path("/proc/driver/nvidia/gpus").is_dir() or shutil.which("nvidia-smi") is not None


def _memory() -> Finding:
    try:
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * size / 2**30
    except (ValueError, OSError, AttributeError):
        return Finding("note", "memory", "this system does not say")
    free = pages * size / 2**30
    level = "ok" if total >= 4 else "note"
    return Finding(
        level,
        "memory",
        f"{total:.1f} GiB, {free:.1f} GiB untouched" + ("" if level == "ok" else "; quickstart needs 4"),
    )


def _disk(folder: Path) -> Finding:
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return Finding("no", "disk", f"no write permission in {existing}; choose another folder")
    return Finding("ok" if free >= 1 else "note", "disk", f"{free:.1f} GiB free at {existing}")


def pair(drafter: str | None, verifier: str | None) -> Iterator[Finding]:
    """Check that two checkpoints make a pair: tokenizers, architectures, vocabularies."""
    if drafter is None or verifier is None:
        raise InputError("--drafter and --verifier are checked together; name both")
    from deferral_train.pairs import load_models

    models = load_models(drafter, verifier, device="cpu")
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (models.drafter, models.verifier)]
    kind = "encoder-decoder" if models.is_encoder_decoder else "decoder-only"
    yield Finding(
        "ok",
        "pair",
        f"{kind}, vocabulary {models.vocab_size}, drafter {sizes[0]:.2f}M, verifier {sizes[1]:.2f}M parameters",
    )
    if sizes[0] * 2 > sizes[1]:
        yield Finding(
            "note", "pair", "the drafter is more than half of the verifier's size: drafting will cost much"
        )


def trace_folder(folder: str) -> Iterator[Finding]:
    """Check that a trace folder is whole: every shard present, every checksum right; and say what was left out."""
    from deferral_train.traces import open_traces

    opened = open_traces(folder, verify=True)
    yield Finding(
        "ok",
        "traces",
        f"{len(opened)} tokens of {len(opened.prompt_ids)} prompts, prefixes: {opened.manifest.prefixes}",
    )
    if not opened.complete:
        shards, planned = len(opened.records), len(opened.manifest.chunks)
        text = f"{shards} of {planned} shards: --max-bytes ended the collection; run collect again to go on"
        yield Finding("note", "traces", text)
    if opened.nonfinite:
        text = f"{opened.nonfinite} positions were left out: a model gave NaN or infinite logits there"
        yield Finding("note", "traces", text)
    skipped = opened.manifest.prompts.get("skipped")
    if isinstance(skipped, list) and skipped:
        text = f"{len(skipped)} prompts were left out; manifest.json says which and why"
        yield Finding("note", "traces", text)


def head_folder(folder: str) -> Iterator[Finding]:
    """Load an exported head and say what it needs to see."""
    from deferral_train.heads import DeferralHead

    loaded = DeferralHead.from_pretrained(folder)
    yield Finding(
        "ok", "head", f"{type(loaded).__name__}, {loaded.stage} stage, reads {', '.join(loaded.features)}"
    )
    expected = loaded.metadata.get("evaluation", {}).get("expected")
    if expected is not None:
        places = expected.get("acceptance_by_place", {}).get("conditional", [])
        yield Finding(
            "note",
            "head",
            f"expect {expected.get('mean_acceptance_length') or 0:.3g} tokens a verifier call at "
            f"{loaded.dial}={loaded.metadata.get(loaded.dial, 0):g}, measured on {expected.get('prompts')} prompts; "
            f"accepted by place {', '.join(f'{share:.2f}' for share in places[:8])}",
        )


def _guard(subject: str, examine: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A subject that cannot be used is a finding, not the end of the diagnosis."""
    try:
        return list(examine())
    except (InputError, OSError) as error:
        return [Finding("no", subject, " ".join(str(error).split()))]
