"""The benchmark for a GPU runs through on a CPU, at toy shapes, and what it forces is what is emitted."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    assert gpu.main(["--small", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_every_part_gives_numbers(result: dict) -> None:
    parts = result["parts"]
    assert set(parts) == set(gpu.PARTS)
    assert parts["tests"]["skipped"] == "they need a CUDA device"
    assert all("failed" not in part and "cut" not in part for part in parts.values())
    times = parts["verification"]["milliseconds"]
    assert all(value > 0 for batch in times.values() for value in batch.values())
    assert parts["collect"]["over_bare"] > 0
    assert 0 < parts["fit"]["regret"] < 1


def test_lengths_are_equal_and_texts_are_those_forced(result: dict) -> None:
    rows = result["parts"]["decoding"]["rows"]
    seen = {(row["contestant"], row["batch"], row["accepted"]) for row in rows}
    assert {(name, b, a) for name in gpu.rules() for b in gpu.BATCHES for a in gpu.ACCEPTED} < seen
    assert ("assisted", 1, 5) in seen
    for row in rows:
        assert row["text_as_forced"], row
        assert row["passes_per_block"] == gpu.DRAFTS + 1, row
        assert isinstance(row["ms_per_block"], float)  # a difference: of toys, noise may outweigh it


def test_the_table_says_everything(result: dict) -> None:
    text = gpu.table(result)
    for word in ("two logsumexp", "head T=1", "batch 16  accepted 3  token_v3", "over_bare", "regret"):
        assert word in text
