"""SIGKILL at random moments, one process or several, resumed with any number of them: the same rows every time."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm import Warm

from deferral_train.traces import open_traces

from .conftest import make_prompts

SETTINGS = {"chunk_prompts": 5, "batch_tokens": 60, "log_top_k": 6, "hidden": "drafter", "device": "cpu"}
PROMPTS = [dataclasses.astuple(prompt) for prompt in make_prompts(40, seed=3)]


class Nursery:
    """Talks to the process of nursery.py."""

    def __init__(self, warm: Warm) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        script = Path(__file__).with_name("nursery.py")
        self.process = subprocess.Popen(
            [warm.python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def collect(
        self, out: Path, ranks: int = 1, kill_after: float | None = None, **settings: Any
    ) -> dict[str, Any]:
        request = {"out": str(out), "ranks": ranks, "kill_after": kill_after, "prompts": PROMPTS}
        request["settings"] = {**SETTINGS, **settings}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery(warm: Warm) -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    started = Nursery(warm)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run of one process, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "traces"
    answer = nursery.collect(folder)
    assert answer["codes"] == [0]
    return folder, answer["seconds"]


def assert_same(folder: Path, whole: Path) -> None:
    """Row for row, byte for byte, no shard more or less, nothing left lying about."""
    expected, found = open_traces(whole, verify=True), open_traces(folder, verify=True)
    assert found.complete
    assert len(found) == len(expected)
    for name in expected.columns:
        pair = found.column(name), expected.column(name)
        assert np.array_equal(*pair, equal_nan=pair[0].dtype.kind == "f"), name
    assert [record.sha256 for record in found.records] == [record.sha256 for record in expected.records]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


def killed_runs(
    nursery: Nursery, base: Path, whole: tuple[Path, float], kills: int, ranks: list[int], seed: int
) -> int:
    """Kill until `kills` runs were hit, each at its own random moment; a run that got through is compared.

    Returns how many kills struck a folder that had some finished shards but not all.
    """
    random = np.random.default_rng(seed)
    hit = halfway = number = 0
    while hit < kills:
        folder = base / str(number)
        moment = float(random.uniform(0.05, 1.0)) * whole[1]
        answer = nursery.collect(folder, int(random.choice(ranks)), moment)
        assert all(code in (0, -signal.SIGKILL) for code in answer["codes"]) or len(answer["codes"]) > 1
        if all(code == 0 for code in answer["codes"]):
            assert_same(folder, whole[0])
            number += 1
            continue
        hit += 1
        ledgers = [path.read_text() for path in folder.glob("chunks*.jsonl")]
        halfway += 0 < sum(text.count("\n") for text in ledgers) < 8
    for unfinished in range(number + 1):
        folder = base / str(unfinished)
        answer = nursery.collect(folder, int(random.choice(ranks)))
        assert set(answer["codes"]) == {0}
        assert_same(folder, whole[0])
    return halfway


def test_twenty_kills_at_random_moments(nursery: Nursery, whole: tuple[Path, float], tmp_path: Path) -> None:
    halfway = killed_runs(nursery, tmp_path, whole, kills=20, ranks=[1], seed=0)
    assert halfway >= 3


def test_two_ranks_give_the_bytes_of_one(nursery: Nursery, whole: tuple[Path, float], tmp_path: Path) -> None:
    assert nursery.collect(tmp_path / "two", ranks=2)["codes"] == [0, 0]
    assert_same(tmp_path / "two", whole[0])


def test_kills_of_two_ranks_resumed_by_one_two_or_three(
    nursery: Nursery, whole: tuple[Path, float], tmp_path: Path
) -> None:
    killed_runs(nursery, tmp_path, whole, kills=5, ranks=[1, 2, 3], seed=1)


SEQUENCE = {
    "labels": "sequence",
    "prefixes": "verifier",
    "temperature": 0.0,
    "max_new_tokens": 8,
    "log_top_k": 0,
}


def test_sequence_labels_are_the_same_killed_and_resumed_and_over_two_ranks(
    nursery: Nursery, tmp_path: Path
) -> None:
    whole = nursery.collect(tmp_path / "whole", **SEQUENCE)
    assert whole["codes"] == [0]
    assert np.isfinite(open_traces(tmp_path / "whole").column("sequence_gap")).sum() > 20
    assert nursery.collect(tmp_path / "two", ranks=2, **SEQUENCE)["codes"] == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "whole")
    struck = tmp_path / "struck"
    for share in (0.3, 0.6, 0.8):
        nursery.collect(struck, ranks=2, kill_after=share * whole["seconds"], **SEQUENCE)
    assert nursery.collect(struck, **SEQUENCE)["codes"] == [0]
    assert_same(struck, tmp_path / "whole")


def test_more_ranks_than_chunks(nursery: Nursery, whole: tuple[Path, float], tmp_path: Path) -> None:
    """At the end of a resumed run there is less work than processes: the idle ones must not fail."""
    folder = tmp_path / "few"
    assert nursery.collect(folder)["codes"] == [0]
    (folder / "shard-00003.arrow").unlink()
    assert nursery.collect(folder, ranks=3)["codes"] == [0, 0, 0]
    assert_same(folder, whole[0])
    assert nursery.collect(folder, ranks=2)["codes"] == [0, 0]  # nothing to do at all
    assert_same(folder, whole[0])


def test_sampled_prefixes_do_not_depend_on_ranks_or_kills(nursery: Nursery, tmp_path: Path) -> None:
    settings = {"prefixes": "cascade", "rule": "opt:alpha=0.3", "max_new_tokens": 6}
    answer = nursery.collect(tmp_path / "whole", **settings)
    assert answer["codes"] == [0]
    nursery.collect(tmp_path / "parts", 1, answer["seconds"] * 0.6, **settings)
    assert nursery.collect(tmp_path / "parts", 2, **settings)["codes"] == [0, 0]
    assert_same(tmp_path / "parts", tmp_path / "whole")
