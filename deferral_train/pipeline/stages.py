"""Resumable stages: a stage counts as finished only when its marker says so, and its marker is written last.

A marker holds what the stage was made from (settings, contents of its inputs, what earlier stages produced), a content
key of every output file, and a small JSON result. A stage whose marker no longer agrees is run again, and the
terminal says why; what it left behind unfinished is its own to resume or replace.
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
from deferral_train.redaction import redacted

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
        inputs: files and folders from outside of the run that it reads, by name; their contents decide, too.
        replace: what the stage left under other settings is removed before it works; without, its own work
            decides what of it can be used.
    """

    name: str
    title: str
    settings: Any
    after: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Callable[[Mapping[str, Any]], Any]
    inputs: Mapping[str, str | Path | None] = field(default_factory=dict)
    replace: bool = False


@dataclass
class StageRecord:
    """A finished stage: its result, how long it took and whether this run reused it.

    Attributes:
        digest: of what it was made from and of its outputs; later stages depend on it.
        why: what changed since the stage was last finished, so that it was run again; empty where nothing is to tell.
    """

    name: str
    result: Any
    seconds: float
    reused: bool
    digest: str = ""
    why: str = ""


@dataclass
class StageRunner:
    """Runs stages in order inside one folder and reuses finished ones.

    Args:
        folder: the run folder; created where absent.
        announce: called with (index, count, stage, record or None): None before work starts.
        explain: called with a line that says why a stage that was finished is run again.
    """

    folder: Path
    announce: Callable[[int, int, Stage, StageRecord | None], None] = lambda *_: None
    explain: Callable[[str], None] = lambda _: None
    records: dict[str, StageRecord] = field(default_factory=dict)

    def run(self, stages: Iterable[Stage]) -> dict[str, StageRecord]:
        """Run every stage that is not finished; returns the records by name."""
        planned = list(stages)
        for index, stage in enumerate(planned, start=1):
            source = self._source(stage)
            record = self._finished(stage, source)
            if record is None or not record.reused:
                why = "" if record is None else record.why
                self.announce(index, len(planned), stage, None)
                if why:
                    self.explain(f"       {stage.name} was finished before and is made anew: {why}")
                record = self._work(stage, source, why)
            self.records[stage.name] = record
            self.announce(index, len(planned), stage, record)
        return self.records

    def results(self) -> dict[str, Any]:
        """Result of every stage so far."""
        return {name: record.result for name, record in self.records.items()}

    def _source(self, stage: Stage) -> dict[str, Any]:
        """Everything the outcome depends on, as JSON-like values."""
        upstream = {name: self.records[name].digest for name in stage.after}
        source = {
            "release": deferral_train.__version__,
            "settings": stage.settings,
            "inputs": provenance.content_keys(stage.inputs),
            "after": upstream,
        }
        return dict(provenance.plain(source))

    def _marker(self, stage: Stage) -> Path:
        return self.folder / MARKERS / f"{stage.name}.json"

    def _finished(self, stage: Stage, source: Mapping[str, Any]) -> StageRecord | None:
        """The stage as it was finished; not ``reused``, with a reason, where it cannot be; None where it never was."""
        try:
            marker = json.loads(self._marker(stage).read_text(encoding="utf-8"))
            key, outputs, result = marker["key"], marker["outputs"], marker["result"]
            before, seconds = marker.get("source"), float(marker["seconds"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return StageRecord(stage.name, None, 0.0, False, why="its marker is damaged")
        if key == _key(stage, source) and outputs == self._outputs(stage):
            return StageRecord(stage.name, result, seconds, True, _digest(key, outputs))
        return StageRecord(stage.name, None, 0.0, False, why=_reason(before, source))

    def _work(self, stage: Stage, source: Mapping[str, Any], why: str) -> StageRecord:
        self._marker(stage).unlink(missing_ok=True)
        key = _key(stage, source)
        if stage.replace:
            self._clear(stage, key)
        start = time.perf_counter()
        result = provenance.plain(stage.work(self.results()))
        seconds = round(time.perf_counter() - start, 3)
        outputs = self._outputs(stage)
        marker = {
            "stage": stage.name,
            "key": key,
            "source": redacted(source),
            "outputs": outputs,
            "result": result,
            "seconds": seconds,
        }
        provenance.write_json(self._marker(stage), marker)
        return StageRecord(stage.name, result, seconds, False, _digest(key, outputs), why)

    def _clear(self, stage: Stage, key: str) -> None:
        """Remove outputs that were begun under another key, and note the key that begins now."""
        begun = self.folder / MARKERS / f"{stage.name}.begun"
        if not begun.is_file() or begun.read_text(encoding="utf-8", errors="replace") != key:
            for output in stage.outputs:
                path = self.folder / output
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        provenance.write_text(begun, key)

    def _outputs(self, stage: Stage) -> dict[str, list[Any]]:
        """Relative path -> [bytes, content key] of every file a stage wrote."""
        files: dict[str, list[Any]] = {}
        for output in stage.outputs:
            root = self.folder / output
            for path in [root] if root.is_file() else sorted(root.rglob("*")):
                if path.is_file() and not path.is_symlink() and not provenance.is_scratch(path.name):
                    name = path.relative_to(self.folder).as_posix()
                    files[name] = [path.stat().st_size, provenance.content_key(path)]
        return files


def _key(stage: Stage, source: Mapping[str, Any]) -> str:
    return provenance.hash_of([stage.name, source])


def _digest(key: str, outputs: Mapping[str, Any]) -> str:
    return provenance.hash_of([key, outputs])


def _reason(before: Any, now: Mapping[str, Any]) -> str:
    """Why a finished stage is run again, in words."""
    if not isinstance(before, Mapping):
        return "an earlier release finished it, without a record of what it was made from"
    found = provenance.changes(before, redacted(now))
    own = [text for text in found if not text.startswith("after.")]
    if own:
        return provenance.told([text.removeprefix("settings.").removeprefix("inputs.") for text in own])
    return "an earlier stage was run again" if found else "its outputs were changed"


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
    provenance.write_json(folder / RUN_FILE, {"config": provenance.record_of(config), **provenance.collect()})
    return folder
