"""Resumable stages: a stage counts as finished only when its marker says so, and its marker is written last.

A marker holds a key (hash of the settings and of what earlier stages produced), the size and checksum of
every output file, and a small JSON result. A stage whose key or outputs no longer agree is run again;
what it left behind unfinished is its own to resume or replace.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deferral_train
from deferral_train import provenance
from deferral_train.errors import InputError

# Larger files are trusted by size alone: a rerun must not read 100 GB of traces twice (they carry checksums).
HASHED_BYTES = 64 << 20
MARKERS = "stages"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Args:
        name: short name, also the marker's file name.
        title: what it does, for the terminal.
        settings: JSON-like; everything the outcome depends on besides earlier stages.
        after: names of the stages whose outputs it reads.
        outputs: files or folders below the run folder that it writes.
        work: does it; gets the results of all earlier stages by name, returns a JSON-like result.
        replace: what the stage left under other settings is removed before it works; without, its own work
            decides what of it can be used.
    """

    name: str
    title: str
    settings: Any
    after: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Callable[[Mapping[str, Any]], Any]
    replace: bool = False


@dataclass
class StageRecord:
    """What a finished stage left: its result, how long it took and whether this run reused it."""

    name: str
    result: Any
    seconds: float
    reused: bool
    digest: str = ""


@dataclass
class StageRunner:
    """Runs stages in order inside one folder and reuses finished ones.

    Args:
        folder: the run folder; created where absent.
        announce: called with (index, count, stage, record or None): None before work starts.
    """

    folder: Path
    announce: Callable[[int, int, Stage, StageRecord | None], None] = lambda *_: None
    records: dict[str, StageRecord] = field(default_factory=dict)

    def run(self, stages: Iterable[Stage]) -> dict[str, StageRecord]:
        """Run every stage that is not finished; returns the records by name."""
        planned = list(stages)
        for index, stage in enumerate(planned, start=1):
            key = self._key(stage)
            record = self._finished(stage, key)
            if record is None:
                self.announce(index, len(planned), stage, None)
                record = self._work(stage, key)
            self.records[stage.name] = record
            self.announce(index, len(planned), stage, record)
        return self.records

    def results(self) -> dict[str, Any]:
        """Result of every stage so far."""
        return {name: record.result for name, record in self.records.items()}

    def _key(self, stage: Stage) -> str:
        upstream = {name: self.records[name].digest for name in stage.after}
        return provenance.hash_of([deferral_train.__version__, stage.name, stage.settings, upstream])

    def _marker(self, stage: Stage) -> Path:
        return self.folder / MARKERS / f"{stage.name}.json"

    def _finished(self, stage: Stage, key: str) -> StageRecord | None:
        try:
            marker = json.loads(self._marker(stage).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if marker.get("key") != key or marker.get("outputs") != self._outputs(stage):
            return None
        return StageRecord(stage.name, marker["result"], marker["seconds"], True, _digest(marker))

    def _work(self, stage: Stage, key: str) -> StageRecord:
        self._marker(stage).unlink(missing_ok=True)
        if stage.replace:
            self._clear(stage, key)
        start = time.perf_counter()
        result = provenance.plain(stage.work(self.results()))
        seconds = round(time.perf_counter() - start, 3)
        marker = {
            "stage": stage.name,
            "key": key,
            "outputs": self._outputs(stage),
            "result": result,
            "seconds": seconds,
        }
        provenance.write_json(self._marker(stage), marker)
        return StageRecord(stage.name, result, seconds, False, _digest(marker))

    def _clear(self, stage: Stage, key: str) -> None:
        """Remove outputs that were begun under another key, and note the key that begins now."""
        begun = self.folder / MARKERS / f"{stage.name}.begun"
        if not begun.is_file() or begun.read_text(encoding="utf-8") != key:
            for output in stage.outputs:
                path = self.folder / output
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        provenance.write_text(begun, key)

    def _outputs(self, stage: Stage) -> dict[str, list[Any]]:
        """Relative path -> [bytes, checksum] of every file a stage wrote."""
        files: dict[str, list[Any]] = {}
        for output in stage.outputs:
            root = self.folder / output
            for path in [root] if root.is_file() else sorted(root.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    size = path.stat().st_size
                    checksum = provenance.sha256(path) if size <= HASHED_BYTES else None
                    files[path.relative_to(self.folder).as_posix()] = [size, checksum]
        return files


def _digest(marker: Mapping[str, Any]) -> str:
    return provenance.hash_of([marker["key"], marker["outputs"]])


def open_run(folder: Path, config: Any, fresh: bool) -> Path:
    """Make or take up a run folder; ``fresh`` removes what an earlier run left in it.

    Raises:
        InputError: the folder holds something else than a run, so nothing in it is touched.
    """
    ours = (folder / RUN_FILE).is_file()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise InputError(
            f"out: {folder} is not empty and is no run folder ({RUN_FILE} is missing); name another folder"
        )
    if fresh and ours:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    provenance.write_json(folder / RUN_FILE, {"config": provenance.plain(config), **provenance.collect()})
    return folder
