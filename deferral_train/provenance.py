"""Atomic files, content keys, one writer a folder, and the record of how an output came to be.

Reuse in one sentence: whoever takes up what lies in a folder records what it was made from (settings, and a
:func:`content_key` of every input), and compares that record with what it would make now (:func:`refuse_reuse`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deferral_train.errors import InputError
from deferral_train.redaction import redacted, redacted_text, redacted_words

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
# Larger files are known by size, time of change and sampled stretches: 100 GB are not read to see that nothing changed.
HASHED_BYTES = 64 << 20
SAMPLES, STRETCH = 64, 4096
_SKIPPED = (".lock", ".tmp")  # endings of hidden files that are no content


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds the old content or the new, never a part: tmp, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
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


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within, an error of the file system says which file it was about: a full disk names none by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def append_text(path: str | Path, text: str, durable: bool = True) -> None:
    """Add text to the end of a file; what a full disk cut short is taken away again, so that later lines stay whole.

    Args:
        durable: wait until the disk has it.
    """
    path = Path(path)
    left = memoryview(text.encode("utf-8"))
    with naming(path), open(path, "ab", buffering=0) as file:  # a buffer would be written again on closing
        end = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise


def write_text(path: str | Path, text: str) -> None:
    """Atomic UTF-8 text, see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Atomic, human-readable JSON, see :func:`write_bytes`; NaN is refused because JSON has none."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Human-readable JSON in UTF-8, a line end behind it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_object(path: str | Path, remedy: str) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is none.

    Args:
        remedy: how to go on where it is damaged, such as ``run that stage again``.

    Raises:
        InputError: it is no JSON, or holds something else than an object.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({str(error)[:100]}); {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; {remedy}")
    return found


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


def content_key(path: str | Path) -> str:
    """A short text that stands for what a file or folder holds: equal keys mean equal contents.

    A file is known by its SHA-256; above :data:`HASHED_BYTES` by size, time of change and sampled stretches. A folder
    is known by the names and keys of the files below it; locks and unfinished temporary files do not count. What is
    not there has the key ``absent``: a hub id or a data set's name is known by its name alone.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not is_scratch(file.name))
        return "folder:" + hash_of([[file.relative_to(path).as_posix(), content_key(file)] for file in files])
    try:
        found = path.stat()
    except OSError:
        return "absent"
    if found.st_size <= HASHED_BYTES:
        return f"sha256:{sha256(path)}"
    digest = hashlib.sha256(f"{found.st_size}:{found.st_mtime_ns}".encode())
    with open(path, "rb") as file:
        for sample in range(SAMPLES):
            file.seek((found.st_size - STRETCH) * sample // (SAMPLES - 1))
            digest.update(file.read(STRETCH))
    return f"sampled:{digest.hexdigest()}"


def is_scratch(name: str) -> bool:
    """True for the hidden files that a lock or an unfinished write leaves: no content of a folder."""
    return name.startswith(".") and name.endswith(_SKIPPED)


def content_keys(paths: Mapping[str, str | Path | None]) -> dict[str, Any]:
    """By name of the input: where it lies and its :func:`content_key`; inputs that are not given are left out."""
    return {
        name: {"path": str(path), "content": content_key(path)}
        for name, path in paths.items()
        if path not in (None, "")
    }


def metric_contents(metrics: Iterable[str]) -> dict[str, Any]:
    """By metric that names a program, a database or a function: content keys of the files that it names.

    ``command:PROGRAM ARGUMENTS`` is its program and every argument that is a file; ``module:function`` the module's.
    """
    found: dict[str, Any] = {}
    for metric in metrics:
        files = files_of_metric(metric)
        if files:
            found[redacted_text(metric)] = {redacted_text(file): content_key(file) for file in files}
    return found


def files_of_metric(metric: str) -> list[str]:
    """The files that a metric names, see :func:`metric_contents`; none for a metric of ours."""
    kind, colon, rest = metric.partition(":")
    if not colon:
        return []
    if kind == "sql":
        return [rest]
    if kind == "command":
        try:
            words = shlex.split(rest)
        except ValueError:  # an open quote: whoever runs the program says so
            words = rest.split()
        programs = [shutil.which(word) or word for word in words[:1]]
        return [word for word in (*programs, *words[1:]) if Path(word).is_file()]
    try:
        module = importlib.util.find_spec(kind)
    except (ImportError, ValueError):
        module = None
    return [module.origin] if module is not None and module.origin is not None else []


def changes(before: Any, now: Any, name: str = "") -> list[str]:
    """The differences of two JSON-like records, one text a place: ``lr: 0.003 -> 0.001``.

    Where a path is the same and its content is not, the text says that the content changed.
    """
    if before == now:
        return []
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if {"path", "content"} <= set(before) & set(now):
            return [_input_change(before, now, name)]
        found = []
        for key in [*before, *(key for key in now if key not in before)]:
            where = f"{name}.{key}" if name else str(key)
            found += changes(before.get(key), now.get(key), where)
        return found
    if isinstance(before, list) and isinstance(now, list) and max(map(len, map(str, (before, now)))) > 80:
        same = len(before) == len(now)
        return [f"{name}: entries differ" if same else f"{name}: {len(before)} -> {len(now)} entries"]
    return [f"{name}: {_shown(before)} -> {_shown(now)}"]


def _input_change(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    if before["path"] != now["path"]:
        return f"{name}: {before['path']} -> {now['path']}"
    return f"{name}: {now['path']} holds something else than before"


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)[:80]


def told(found: list[str], most: int = 3) -> str:
    """The first few of several differences as one line."""
    more = f" (and {len(found) - most} more)" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def refuse_reuse(folder: str | Path, before: Any, now: Any, remedy: str) -> None:
    """Refuse to take up what lies in ``folder`` where it was made from other settings or contents.

    Args:
        folder: named in the message.
        before: the record in the folder; None where it holds none, as folders of earlier releases.
        now: what would be made, as JSON-like values.
        remedy: how to go on, such as ``--fresh starts over, or name another --out``.

    Raises:
        InputError: they differ, naming what; or there is no record.
    """
    if before is None:
        raise InputError(f"{folder} does not record what it was made from (an earlier release); {remedy}")
    now = record_of(now)
    found = changes(before, now)
    if found:
        other = ", ".join(sorted(k for k in {*before, *now} if before.get(k) != now.get(k)))
        raise InputError(f"{folder} holds a run with other {other} ({told(found)}); {remedy}")


def is_first_process() -> bool:
    """False in a process that torchrun, srun or Lightning started as another than the first of its job."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


@contextlib.contextmanager
def one_writer(folder: str | Path, doing: str = "command") -> Iterator[None]:
    """Within, this process alone writes to ``folder``; the operating system ends the claim with the process.

    The lock lies beside the folder, or inside where nothing can be written beside it. Addresses of remote stores
    (``scheme://``) cannot be locked. Of the processes of one job the first holds the lock for all.

    Args:
        folder: made where absent.
        doing: what a second one is told is working there.

    Raises:
        InputError: another process holds it.
    """
    if "://" in str(folder) or not is_first_process():
        yield
        return
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}.lock"
    if not os.access(folder.parent, os.W_OK):
        lock = folder / ".lock"
    try:
        with naming(lock):
            held = FileLock(lock, timeout=0)
            held.acquire()
    except Timeout:
        raise InputError(
            f"out: another {doing} is working in {folder}; wait for it or name another folder"
        ) from None
    try:
        yield
    finally:
        held.release()


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


def record_of(value: Any) -> Any:
    """:func:`plain` without secrets: what may be written beside an output."""
    return redacted(plain(value))


def collect(seeds: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The record of where an output came from: command line, versions, revision, machine, time, seeds.

    Secrets of the command line are withheld.
    """
    return {
        "argv": [Path(sys.argv[0]).name, *redacted_words(sys.argv[1:])],
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
