"""A folder of files, on this machine or at any fsspec address, with writes that are whole or absent.

Knows nothing about traces. Local files are memory mapped and written as tmp + fsync + rename; remote ones
(``scheme://...``) are read into memory and written under their final name only once they are complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from deferral_train import provenance
from deferral_train.errors import InputError, MissingExtraError


class Sink:
    """A file object that counts and hashes what passes through it."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self._digest = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.file.write(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    closed = False
    writable = staticmethod(lambda: True)
    readable = seekable = staticmethod(lambda: False)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Left to the owner of the file."""


class Folder:
    """A local folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """File names, sorted; empty where the folder is not there."""
        return sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where it is not there."""
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def buffer(self, name: str) -> pa.Buffer:
        """The whole file as one buffer, memory mapped."""
        with pa.memory_map(str(self.path / name)) as file:
            return file.read_buffer()

    def sha256(self, name: str) -> str:
        return provenance.sha256(self.path / name)

    def write(self, name: str, data: bytes) -> None:
        provenance.write_bytes(self.path / name, data)

    def write_with(self, name: str, fill: Callable[[Sink], None]) -> Sink:
        """Write a file through a sink, so that it is never held in memory whole: tmp, fsync, rename."""
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        with provenance.naming(self.path / name):
            try:
                with open(temporary, "wb") as file:
                    sink = Sink(file)
                    fill(sink)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / name)
            finally:
                temporary.unlink(missing_ok=True)
        provenance.sync_folder(self.path)
        return sink

    def append_line(self, name: str, line: str) -> None:
        """Add one line durably; a line cut by a crash is what readers of these files pass over."""
        provenance.append_text(self.path / name, line + "\n")

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Free space on the disk, None where nobody can say."""
        existing = next(place for place in [self.path, *self.path.absolute().parents] if place.exists())
        return shutil.disk_usage(existing).free


class RemoteFolder(Folder):
    """A folder at an fsspec address; every method as in :class:`Folder`."""

    def __init__(self, address: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise MissingExtraError("fsspec", "train") from error
        self.address = address.rstrip("/")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{address}: fsspec cannot open this address ({error}); check its scheme"
            ) from error

    def __str__(self) -> str:
        return self.address

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def make(self) -> None:
        self.files.makedirs(self.root, exist_ok=True)

    def names(self) -> list[str]:
        self.files.invalidate_cache()
        if not self.files.exists(self.root):
            return []
        return sorted(
            str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.files.ls(self.root, detail=False)
        )

    def size(self, name: str) -> int | None:
        try:
            return int(self.files.size(self._at(name)))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        return bytes(self.files.cat_file(self._at(name)))

    def buffer(self, name: str) -> pa.Buffer:
        return pa.py_buffer(self.read(name))

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read(name)).hexdigest()

    def write(self, name: str, data: bytes) -> None:
        self.make()
        self.files.pipe_file(self._at(name), data)

    def write_with(self, name: str, fill: Callable[[Sink], None]) -> Sink:
        temporary = self._at(f".{name}.{os.getpid()}.tmp")
        with self.files.open(temporary, "wb") as file:
            sink = Sink(file)
            fill(sink)
        self.files.mv(temporary, self._at(name))
        return sink

    def append_line(self, name: str, line: str) -> None:
        """Object stores cannot append: the small file is written anew; each writer has a file of its own."""
        before = self.read(name) if self.size(name) is not None else b""
        self.write(name, before + line.encode() + b"\n")

    def remove(self, name: str) -> None:
        if self.size(name) is not None:
            self.files.rm_file(self._at(name))

    def free_bytes(self) -> int | None:
        return None


def open_folder(address: str | Path) -> Folder:
    """A local folder, or a remote one where the address holds ``://``."""
    return RemoteFolder(str(address)) if "://" in str(address) else Folder(Path(address).expanduser())
