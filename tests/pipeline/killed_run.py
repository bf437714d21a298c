"""A process that runs a config again and again in forked children and kills each in another stage.

Usage: killed_run.py CONFIG.yaml OUT SEED. Forking after the imports saves seconds a kill; the children are real
processes and the signal is a real SIGKILL. Prints one line a kill: stage, and whether it was still unfinished.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

# Imported before forking because a child would otherwise spend its life on them.
import deferral_train.collecting
import deferral_train.decoding.decode
import deferral_train.evaluation
import deferral_train.report
import deferral_train.training.fit  # noqa: F401
from deferral_train.pipeline.config import read_config
from deferral_train.pipeline.console import RunConsole
from deferral_train.pipeline.run import Run, run

torch.set_num_threads(1)


def child(config_path: str, out: str, stage_name: str, pipe: int) -> None:
    """Run until done; say through the pipe when the wanted stage starts."""
    announce = RunConsole.announce

    def tell(self, index, count, stage, record):
        announce(self, index, count, stage, record)
        if record is None and stage.name == stage_name:
            os.write(pipe, b"!")

    RunConsole.announce = tell
    run(read_config(config_path, out=out))


def kill_in(config_path: str, out: str, stage: str, delay: float) -> bool:
    """Start a run and kill it in ``stage``; returns whether the stage was unfinished then."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            child(config_path, out, stage, writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    started = os.read(reader, 1)
    os.close(reader)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert started == b"!", f"the run never reached stage {stage} (status {status})"
    return not (Path(out) / "stages" / f"{stage}.json").exists()


def main() -> None:
    config_path, out, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    draw = random.Random(seed)
    stages = [stage.name for stage in Run(read_config(config_path, out=out), Path(out)).stages()]
    for stage in stages:
        delay = draw.uniform(0.0, 0.4)
        if (Path(out) / "stages" / f"{stage}.json").exists():
            # An instant stage was over before the kill that was meant for the one before it.
            print("killed", stage, "over", flush=True)
        else:
            print("killed", stage, kill_in(config_path, out, stage, delay), flush=True)


if __name__ == "__main__":
    main()
