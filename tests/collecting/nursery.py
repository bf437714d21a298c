"""A process that has imported everything and forks collect runs on request, alone or as DDP ranks on gloo.

Reads one JSON request a line: ``{"out", "ranks", "kill_after", "settings"}``; forks the ranks, sends SIGKILL to all
of them after ``kill_after`` seconds (None: never), and answers one JSON line: ``{"codes", "seconds"}``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytorch_lightning  # noqa: F401
import tiny_models
import torch
from transformers import T5ForConditionalGeneration  # noqa: F401

from deferral_train.collecting import CollectConfig, collect
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for each of its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "nursery",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def child(request: dict[str, Any], rank: int, port: int, pair: Any) -> None:
    """One collect run; never returns."""
    code = 1
    try:
        if request["ranks"] > 1:
            os.environ.update(rank_environment(rank, request["ranks"], port))
        prompts = [Prompt(*row) for row in request["prompts"]]
        config = CollectConfig(**request["settings"], devices=request["ranks"])
        scores = make_scorers(config.metrics) if config.labels == "sequence" else None
        collect(config, request["out"], progress=False, models=pair, prompts=prompts, scores=scores)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(request: dict[str, Any], pair: Any) -> dict[str, Any]:
    start, port = time.monotonic(), free_port()
    children = []
    for rank in range(request["ranks"]):
        process = os.fork()
        if process == 0:
            child(request, rank, port, pair)
        children.append(process)
    left, codes = set(children), {}
    while left:
        for process in list(left):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
                left.discard(process)
        late = request["kill_after"] is not None and time.monotonic() - start > request["kill_after"]
        failed = any(code != 0 for code in codes.values())
        if left and (late or failed):  # as torchrun does: one rank's end is the end of all
            for process in left:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    return {"codes": [codes[process] for process in children], "seconds": time.monotonic() - start}


def main() -> None:
    torch.set_num_threads(1)
    pair = make_pair(*tiny_models.tiny_pair("t5"))
    with tempfile.TemporaryDirectory() as scratch:  # what is imported late is imported before the first fork
        config = CollectConfig(device="cpu", prefixes="cascade", rule="opt:alpha=0.3", max_new_tokens=2)
        collect(config, scratch, progress=False, models=pair, prompts=[Prompt("a", "w1 w2")])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), pair)), flush=True)


if __name__ == "__main__":
    main()
