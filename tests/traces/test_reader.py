"""What is read is what was written, in the documented types, with or without this package."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from deferral_train import open_traces
from deferral_train.errors import InputError
from deferral_train.rules.summary import COMPUTED_FIELDS, FIELDS
from deferral_train.traces import SCHEMA_VERSION, Manifest, split_prompts
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS, Layout

from .conftest import PROMPTS, make_manifest, write_folder

ROWS = PROMPTS * (PROMPTS + 1) // 2


def test_the_files_summary_columns_are_the_rules_summary_fields() -> None:
    logged = set(SUMMARY_COLUMNS) | set(TOKEN_COLUMNS)
    assert COMPUTED_FIELDS - {"drafter_margin", "verifier_margin"} <= logged <= COMPUTED_FIELDS
    integers = {name for name, kind in Layout(cascade=True).columns.items() if pa.types.is_integer(kind)}
    assert {name for name in integers if name in FIELDS} == {
        name for name in Layout(cascade=True).columns if name in FIELDS and FIELDS[name].dtype == "int"
    }


def test_every_column_comes_back_bit_for_bit(tmp_path: Path, manifest: Manifest) -> None:
    written = write_folder(tmp_path, manifest)
    traces = open_traces(tmp_path, verify=True)
    assert len(traces) == ROWS
    assert set(traces.columns) == set(written)
    for name, values in written.items():
        read = traces.column(name)
        assert np.array_equal(read, values.astype(read.dtype)), name
    assert traces.column("drafter_top_ids").shape == (ROWS, 4)
    assert traces.column("drafter_top_verifier_logprobs").dtype == np.float16


def test_one_shard_is_memory_mapped(tmp_path: Path) -> None:
    write_folder(tmp_path, make_manifest(chunks=make_manifest().chunks[:1]))
    traces = open_traces(tmp_path)
    column = traces.column("kl")
    assert not column.flags.owndata
    assert not column.flags.writeable


def test_manifest_survives_its_file(folder: Path, manifest: Manifest) -> None:
    assert open_traces(folder).manifest == dataclasses.replace(manifest, provenance={})


def test_summary_holds_fields_as_rules_expect_them(folder: Path) -> None:
    traces = open_traces(folder)
    summary = traces.summary()
    assert "drafter_hidden" not in summary
    assert set(summary.names) == {*SUMMARY_COLUMNS, *TOKEN_COLUMNS, "position"}
    assert summary.drafter_argmax.dtype == torch.int64
    assert summary.kl.dtype == torch.float32
    assert traces.summary(["drafter_hidden", "kl"]).drafter_hidden.shape == (ROWS, 8)
    with pytest.raises(InputError, match=r"no summary field 'verifier_hidden' \(collect with --hidden\)"):
        traces.summary(["verifier_hidden"])


def test_tv_follows_the_temperature(folder: Path) -> None:
    traces = open_traces(folder)
    stored = torch.from_numpy(traces.column("tv"))
    assert torch.equal(traces.summary(["tv"]).tv, stored)
    assert torch.equal(traces.summary(["tv"], temperature=0.5).tv, stored)
    unscaled = torch.from_numpy(traces.column("tv_unscaled"))
    assert torch.equal(traces.summary(["tv"], temperature=1).tv, unscaled)
    greedy = traces.summary(["tv", "drafter_argmax", "verifier_argmax"], temperature=0)
    assert torch.equal(greedy.tv, (greedy.drafter_argmax != greedy.verifier_argmax).float())
    with pytest.raises(InputError, match=r"temperature=0\.7: these traces hold D_TV for 0\.5, 1 and 0"):
        traces.summary(temperature=0.7)


def test_rows_of_chosen_prompts(folder: Path) -> None:
    traces = open_traces(folder)
    chosen = traces.select_prompts(["p7", "p1"])
    assert chosen.prompt_ids == ("p1", "p7")
    mask = np.isin(traces.prompt_of_row, [1, 7])
    for name in ("kl", "drafter_top_ids", "drafter_hidden", "prompt"):
        assert np.array_equal(chosen.column(name), traces.column(name)[mask]), name
    again = chosen.select_prompts(["p7"])
    assert np.array_equal(again.column("kl"), traces.column("kl")[traces.prompt_of_row == 7])
    assert torch.equal(again.summary(["kl"]).kl, torch.from_numpy(again.column("kl")))
    with pytest.raises(InputError, match="'p1' is not among the 1"):
        again.select_prompts(["p1"])


def test_splits_are_disjoint_by_prompt_and_depend_on_the_seed(folder: Path) -> None:
    traces = open_traces(folder)
    parts = split_prompts(traces, [0.4, 0.3, 0.3], seed=1)
    ids = [set(part.prompt_ids) for part in parts]
    assert sum(map(len, ids)) == PROMPTS == len(set.union(*ids))
    assert sum(map(len, parts)) == ROWS
    again = split_prompts(traces, [0.4, 0.3, 0.3], seed=1)
    assert [part.prompt_ids for part in parts] == [part.prompt_ids for part in again]
    assert {split_prompts(traces, [0.5], seed=seed)[0].prompt_ids for seed in range(5)} != {
        parts[0].prompt_ids
    }
    for bad in ([0.9, 0.2], [0.0], []):
        with pytest.raises(InputError, match="fractions="):
            split_prompts(traces, bad)
    with pytest.raises(InputError, match="9 prompts are too few"):
        split_prompts(traces, [0.01, 0.99])


def test_plain_pyarrow_reads_a_shard(folder: Path) -> None:
    with pa.memory_map(str(folder / "shard-00001.arrow")) as source:
        table = pa.ipc.open_stream(source).read_all()
    traces = open_traces(folder).select_prompts(["p3", "p4", "p5"])
    assert table.column("kl").null_count == 0
    assert np.array_equal(table.column("kl").to_numpy(), traces.column("kl"))
    assert table.schema.metadata[b"deferral_train.schema_version"] == str(SCHEMA_VERSION).encode()


def test_datasets_reads_a_shard_and_parquet_keeps_it(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    traces = open_traces(folder)
    files = sorted(str(path) for path in folder.glob("shard-*.arrow"))
    data = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    assert len(data) == ROWS
    data.to_parquet(str(tmp_path / "traces.parquet"))
    import pyarrow.parquet as parquet

    table = parquet.read_table(tmp_path / "traces.parquet")
    assert np.array_equal(table.column("drafter_entropy").to_numpy(), traces.column("drafter_entropy"))
    ids = table.column("verifier_top_ids").combine_chunks().flatten().to_numpy().reshape(-1, 4)
    assert np.array_equal(ids, traces.column("verifier_top_ids"))


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_other_schema_versions_are_refused_by_name(folder: Path, version: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    with pytest.raises(
        InputError, match=rf"schema_version={version}: this release reads 1, 2; use the release"
    ):
        open_traces(folder)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a trace folder"):
        open_traces(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(InputError, match="damaged"):
        open_traces(tmp_path)


def test_remote_folders_behave_like_local_ones(manifest: Manifest) -> None:
    import fsspec

    address = "memory://bucket/traces"
    written = write_folder(address, manifest)
    traces = open_traces(address, verify=True)
    assert np.array_equal(traces.column("js"), written["js"].astype(np.float32))
    files = fsspec.filesystem("memory")
    assert not [name for name in files.ls("/bucket/traces", detail=False) if name.endswith(".tmp")]
    shard = "/bucket/traces/shard-00002.arrow"
    data = bytearray(files.cat_file(shard))
    data[len(data) // 2] ^= 1
    files.pipe_file(shard, bytes(data))
    with pytest.raises(InputError, match=r"shard-00002\.arrow: its bytes were altered"):
        open_traces(address, verify=True)
    write_folder(address, manifest)
    assert len(open_traces(address, verify=True)) == ROWS
    files.rm("/bucket", recursive=True)
