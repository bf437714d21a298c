"""Nothing cut, altered or unfinished is ever taken for whole; resuming repairs exactly the damaged part."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from deferral_train.errors import InputError
from deferral_train.traces import Manifest, Traces, TraceWriter, open_traces, prepare_folder
from deferral_train.traces.manifest import read_header

from .conftest import make_columns, make_manifest, write_folder


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.arrow"))}


def read_everything(traces: Traces) -> dict[str, np.ndarray]:
    return {name: traces.column(name) for name in traces.columns}


def what_reading_says(folder: Path, expected: dict[str, np.ndarray]) -> str:
    """The reader's complaint; empty where every value is right, "wrong values" where one is not."""
    try:
        read = read_everything(open_traces(folder))
    except InputError as error:
        return str(error)
    return "" if all(np.array_equal(read[name], expected[name]) for name in expected) else "wrong values"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def test_one_flipped_byte_is_named_or_harmless_and_always_found_by_verify(folder: Path) -> None:
    """Any byte of a shard: the reader names the shard, or gives the very values that were written."""
    path = folder / "shard-00001.arrow"
    whole, expected = path.read_bytes(), read_everything(open_traces(folder))
    random = np.random.default_rng(0)
    named = 0
    for place in random.choice(len(whole), 120, replace=False):
        flip(path, int(place))
        with pytest.raises(InputError, match=r"shard-00001\.arrow: its bytes were altered.*collect again"):
            open_traces(folder, verify=True)
        problem = what_reading_says(folder, expected)
        assert problem == "" or ("shard-00001.arrow" in problem and "\n" not in problem)
        named += problem != ""
        path.write_bytes(whole)
    assert named > 30


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.999])
def test_a_cut_shard_is_named_at_opening(folder: Path, keep: float) -> None:
    path = folder / "shard-00002.arrow"
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(InputError, match=r"shard-00002\.arrow: \d+ bytes instead of \d+"):
        open_traces(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "shard-00000.arrow").unlink()
    with pytest.raises(InputError, match=r"shard-00000\.arrow: the shard is missing"):
        open_traces(folder)


def test_an_unfinished_folder_is_refused_unless_a_part_is_asked_for(
    tmp_path: Path, manifest: Manifest
) -> None:
    todo = prepare_folder(str(tmp_path), manifest)
    writer = TraceWriter(str(tmp_path), manifest)
    writer.write(todo[1], make_columns(manifest, todo[1]))
    with pytest.raises(InputError, match=r"2 of 3 shards are not there yet, first shard-00000\.arrow"):
        open_traces(tmp_path)
    part = open_traces(tmp_path, partial=True)
    assert not part.complete
    assert part.prompt_ids == ("p3", "p4", "p5")
    writer.stop("max_bytes=100")
    assert not open_traces(tmp_path).complete


def test_resuming_repairs_exactly_the_damaged_shards(folder: Path, manifest: Manifest) -> None:
    before = shard_bytes(folder)
    untouched = (folder / "shard-00001.arrow").stat()
    flip(folder / "shard-00000.arrow", 2000)
    os.truncate(folder / "shard-00002.arrow", 100)
    assert [chunk.id for chunk in prepare_folder(str(folder), manifest)] == [0, 2]
    write_folder(folder, manifest)
    assert shard_bytes(folder) == before
    after = (folder / "shard-00001.arrow").stat()
    assert (after.st_mtime_ns, after.st_ino) == (untouched.st_mtime_ns, untouched.st_ino)
    open_traces(folder, verify=True)


def test_a_torn_ledger_line_means_that_chunk_again(folder: Path, manifest: Manifest) -> None:
    ledger = folder / "chunks.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-40])
    with pytest.raises(InputError, match="1 of 3 shards are not there yet"):
        open_traces(folder)
    write_folder(folder, manifest)
    assert open_traces(folder, verify=True).complete


def test_a_damaged_ledger_line_is_named_and_repaired(folder: Path, manifest: Manifest) -> None:
    before = shard_bytes(folder)
    ledger = folder / "chunks.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(InputError, match=r"chunks\.jsonl, line 2: damaged; run collect again"):
        open_traces(folder)
    assert [chunk.id for chunk in prepare_folder(str(folder), manifest)] == [1]
    write_folder(folder, manifest)
    assert shard_bytes(folder) == before


def test_lines_of_several_processes_become_one_ledger(tmp_path: Path, manifest: Manifest) -> None:
    for rank, chunk in enumerate(prepare_folder(str(tmp_path), manifest)):
        TraceWriter(str(tmp_path), manifest, rank).write(chunk, make_columns(manifest, chunk))
    assert (tmp_path / "chunks.rank2.jsonl").exists()
    assert open_traces(tmp_path, verify=True).complete
    assert prepare_folder(str(tmp_path), manifest) == []
    assert sorted(path.name for path in tmp_path.glob("chunks*")) == ["chunks.jsonl"]


CHANGES = {
    "pair": {"drafter": {"weights": "cc"}, "verifier": {"weights": "bb"}},
    "temperature": 1.0,
    "top_k": 8,
    "seed": 3,
    "prompts": {"sha256": "other"},
    "prefixes": "drafter",
    "settings": {"max_new_tokens": 7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_with_something_else_names_it(folder: Path, manifest: Manifest, name: str) -> None:
    changed = dataclasses.replace(manifest, **{name: CHANGES[name]})
    before = shard_bytes(folder)
    with pytest.raises(InputError, match=rf"was collected with other settings: {name}") as caught:
        prepare_folder(str(folder), changed)
    assert "\n" not in str(caught.value)
    assert shard_bytes(folder) == before


def test_a_moved_checkpoint_and_a_later_day_are_no_change(folder: Path, manifest: Manifest) -> None:
    pair = {**manifest.pair, "drafter": {"weights": "aa", "name": "elsewhere"}}
    later = dataclasses.replace(manifest, pair=pair, provenance={"time": "later"})
    assert prepare_folder(str(folder), later) == []
    assert read_header(TraceWriter(str(folder), manifest).folder).provenance == {}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path, manifest: Manifest) -> None:
    """/dev/full gives the kernel's real ENOSPC."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    todo = prepare_folder(str(tmp_path), manifest)
    writer = TraceWriter(str(tmp_path), manifest)
    writer.write(todo[0], make_columns(manifest, todo[0]))
    (tmp_path / f".{todo[1].file}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"the disk is full at shard-00001\.arrow; finished shards are safe"):
        writer.write(todo[1], make_columns(manifest, todo[1]))
    assert [path.name for path in tmp_path.glob("*shard*")] == ["shard-00000.arrow"]
    assert [chunk.id for chunk in prepare_folder(str(tmp_path), manifest)] == [1, 2]


def test_a_disk_without_room_for_the_header_is_one_line(tmp_path: Path, manifest: Manifest) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / f".manifest.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"the disk is full at manifest\.json; .*free space"):
        prepare_folder(str(tmp_path), manifest)
    assert list(tmp_path.iterdir()) == []
    assert len(prepare_folder(str(tmp_path), manifest)) == 3


def test_columns_that_do_not_fit_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    todo = prepare_folder(str(tmp_path), manifest)
    columns = make_columns(manifest, todo[0])
    writer = TraceWriter(str(tmp_path), manifest)
    with pytest.raises(InputError, match=r"missing \['kl'\]"):
        writer.write(todo[0], {name: values for name, values in columns.items() if name != "kl"})
    with pytest.raises(InputError, match=r"trace column kl: 1 values for 6 rows"):
        writer.write(todo[0], {**columns, "kl": columns["kl"][:1]})
    assert not list(tmp_path.glob("*shard*"))


def test_names_of_settings_are_checked() -> None:
    with pytest.raises(InputError, match="prefixes='nonsense'"):
        make_manifest(prefixes="nonsense")
    with pytest.raises(InputError, match="hidden="):
        _ = make_manifest(hidden={"teacher": 4}).layout


def test_a_ledger_that_names_a_file_outside_the_folder_is_refused(folder: Path) -> None:
    """An altered ledger must not make the reader open what lies elsewhere."""
    outside = folder.parent / "outside.arrow"
    outside.write_bytes((folder / "shard-00000.arrow").read_bytes())
    ledger = folder / "chunks.jsonl"
    ledger.write_text(ledger.read_text().replace("shard-00000.arrow", "../outside.arrow"))
    with pytest.raises(InputError, match=r"chunks\.jsonl"):
        open_traces(folder)


def test_a_shard_that_the_manifest_does_not_plan_is_refused_and_dropped_on_resuming(
    folder: Path, manifest: Manifest
) -> None:
    ledger = folder / "chunks.jsonl"
    last = ledger.read_text().splitlines()[-1]
    stranger = last.replace('"id":2', '"id":9').replace("shard-00002", "shard-00009")
    (folder / "shard-00009.arrow").write_bytes((folder / "shard-00002.arrow").read_bytes())
    ledger.write_text(ledger.read_text() + stranger + "\n")
    for partial in (False, True):
        with pytest.raises(InputError, match="lists shard 9, which the manifest does not plan"):
            open_traces(folder, partial=partial)
    assert prepare_folder(str(folder), manifest) == []
    assert len(open_traces(folder, verify=True).records) == 3
