"""The snippets of docs/trace_format.md, run as they stand, one after the other, beside a folder named ``traces``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from deferral_train import open_traces

PAGE = Path(__file__).parents[2] / "docs" / "trace_format.md"


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_pages_snippets_read_and_publish_every_value(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "reader").mkdir()
    shutil.copytree(folder, tmp_path / "reader" / "traces")
    monkeypatch.chdir(tmp_path / "reader")
    given: dict[str, Any] = {}
    for snippet in snippets():
        exec(compile(snippet, str(PAGE), "exec"), given)
    traces = open_traces("traces", verify=True)
    published = parquet.read_table("traces.parquet")
    metadata = parquet.read_metadata("traces.parquet")
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert len(given["table"]) == len(given["data"]) == len(published) == len(traces)
    for name in traces.columns:
        for table in (given["table"], published):
            column = table.column(name).combine_chunks()
            values = column.flatten() if traces.column(name).ndim == 2 else column
            assert np.array_equal(values.to_numpy(zero_copy_only=False), traces.column(name).reshape(-1)), (
                name
            )
    again = datasets.load_dataset("parquet", data_files="traces.parquet", cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    assert np.array_equal(np.array(again["drafter_top_ids"]), traces.column("drafter_top_ids"))
    assert len(given["label"]) == len(given["fit"]) < len(traces)
