"""Atomic files, checksums and the record of how an output came to be. Needs the standard library only."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "deferral-train",
    "torch",
    "transformers",
    "pytorch-lightning",
    "datasets",
    "torchmetrics",
    "pyarrow",
    "numpy",
    "scikit-learn",
)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds the old content or the new, never a part: tmp, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Atomic UTF-8 text, see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Atomic, human-readable JSON, see :func:`write_bytes`; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: str | Path) -> None:
    """Make a rename inside ``folder`` durable; quietly does nothing on systems that cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(value: Any) -> str:
    """Short, stable hash of a JSON-like value: keys sorted, first 16 hex digits of SHA-256."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A JSON-like copy of ``value``: dataclasses and mappings become dicts, paths and the rest strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def versions() -> dict[str, str]:
    """Installed versions of the packages whose behaviour we depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_revision() -> str | None:
    """Revision of the checkout this package runs from, ``+dirty`` where it has changes, None outside of git."""
    here = Path(__file__).resolve().parent
    try:
        revision = _git(here, "rev-parse", "HEAD")
        return revision + ("+dirty" if _git(here, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()


def collect(seeds: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What is needed to say where an output came from: command line, versions, revision, machine, time, seeds."""
    return {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": {
            "system": platform.system(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seeds": dict(seeds or {}),
    }
