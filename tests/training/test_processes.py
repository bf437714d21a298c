"""Two processes (gloo) give the metrics of one, to float tolerance, with equal effective batches."""

import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, sys
import torch
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit
torch.set_num_threads(1)
config, out = FitConfig(**json.loads(sys.argv[1])), sys.argv[2]
result = fit(config, out, resume=False)
import os
if int(os.environ.get("LOCAL_RANK", "0")) == 0:
    weights = {k: v.tolist() for k, v in result.head.state_dict().items()}
    json.dump({"metrics": dict(result.metrics), "weights": weights}, open(out + "/result.json", "w"))
"""


def run(warm, settings, out, processes):
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "RANK": str(rank),
        }
        command = [warm.python, "-W", "ignore", "-c", SCRIPT, json.dumps(settings), str(out)]
        children.append(subprocess.Popen(command, env=env, cwd=TESTS.parent))
    assert [child.wait(timeout=240) for child in children] == [0] * processes
    return json.loads((out / "result.json").read_text())


@pytest.mark.timeout(280)
def test_two_processes_give_the_metrics_of_one(config, tmp_path, warm):
    shared = {**vars(config), "epochs": 2, "lr": 1e-3, "figure_every": 0, "optimizer": "sgd"}
    one = run(warm, {**shared, "batch_size": 200}, tmp_path / "one", 1)
    two = run(warm, {**shared, "batch_size": 100, "devices": 2, "strategy": "ddp"}, tmp_path / "two", 2)
    assert set(one["metrics"]) == set(two["metrics"])
    for name, value in one["metrics"].items():
        np.testing.assert_allclose(
            two["metrics"][name], value, rtol=1e-4, atol=1e-6, err_msg=name, equal_nan=True
        )
    for name, value in one["weights"].items():
        np.testing.assert_allclose(two["weights"][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
