"""torchrun and SLURM: the same command, several real processes, the bytes of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import Warm

from deferral_train.collecting.launch import Launch, launch, processes
from deferral_train.errors import InputError
from deferral_train.traces import open_traces

from .conftest import make_prompts, tiny
from .nursery import free_port

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SRUN = {"SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"LOCAL_RANK": "1"}, None),  # a process that Lightning started itself
        (TORCHRUN, Launch(rank=5, local_rank=1, devices=4, num_nodes=2)),
        ({**SRUN, "SLURM_JOB_NAME": "collect"}, Launch(rank=4, local_rank=1, devices=3, num_nodes=2)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, None),
    ],
)
def test_what_the_launcher_says(environment: dict[str, str], expected: Launch | None) -> None:
    assert launch(environment) == expected


def test_a_number_of_processes_that_was_not_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes(3, 2) == (3, 2)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert processes(1, 1) == processes(4, 2) == (4, 2)
    with pytest.raises(
        InputError, match="devices=2, num_nodes=1: the launcher started 4 processes on each of 2"
    ):
        processes(2, 1)
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(InputError, match="7 processes do not spread evenly over nodes"):
        processes(1, 1)


def slurm_environment(rank: int, port: int) -> dict[str, str]:
    """What srun sets for two tasks on one node, as far as Lightning reads it."""
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "collect",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.slow
def test_torchrun_and_srun_give_the_bytes_of_one_process(tmp_path: Path) -> None:
    """Real commands; srun itself is not here, so each of its tasks is started with the environment it would set."""
    drafter, verifier = tiny.save_tiny_pair("t5", tmp_path / "pair")
    lines = [json.dumps(vars(prompt)) + "\n" for prompt in make_prompts(30)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    arguments = [
        "deferral_train.cli",
        "collect",
        f"--drafter={drafter}",
        f"--verifier={verifier}",
        "--device=cpu",
    ]
    arguments += [f"--prompts={tmp_path / 'prompts.jsonl'}", "--chunk-prompts=5", "--log-top-k=6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    port = free_port()
    runs: dict[str, list[tuple[list[str], dict[str, str]]]] = {
        "alone": [([], {})],
        "torchrun": [(launcher, {})],
        "srun": [([], slurm_environment(rank, port)) for rank in range(2)],
    }
    found = {}
    for name, starts in runs.items():
        started = [
            subprocess.Popen(
                [sys.executable, *prefix, "-m", *arguments, f"--out={tmp_path / name}"],
                env={**environment, **extra},
                stderr=subprocess.PIPE,
                text=True,
            )
            for prefix, extra in starts
        ]
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
        found[name] = [record.sha256 for record in open_traces(tmp_path / name, verify=True).records]
    assert len(found["alone"]) == 6
    assert found["torchrun"] == found["srun"] == found["alone"]


def test_sigterm_ends_a_run_which_goes_on_later(tmp_path: Path, warm: Warm) -> None:
    """As schedulers send it before they take a machine back; Lightning's own predict loop goes on regardless."""
    drafter, verifier = tiny.save_tiny_pair("t5", tmp_path / "pair")
    lines = [json.dumps(vars(prompt)) + "\n" for prompt in make_prompts(400)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    command = [warm.python, "-m", "deferral_train.cli", "collect", f"--drafter={drafter}"]
    command += [f"--verifier={verifier}", "--device=cpu", f"--prompts={tmp_path / 'prompts.jsonl'}"]
    command += ["--chunk-prompts=4", "--log-top-k=6", f"--out={tmp_path / 'traces'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("traces/shard*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.splitlines()[-1].endswith("collect: terminated; run the same command again to continue")
    unfinished = open_traces(tmp_path / "traces", verify=True, partial=True)
    assert 0 < len(unfinished.records) < 100
    subprocess.run(command, check=True, capture_output=True)
    assert len(open_traces(tmp_path / "traces", verify=True).records) == 100
