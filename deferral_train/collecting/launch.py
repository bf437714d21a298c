"""How this process was started: alone, by torchrun, or by SLURM's srun.

A launcher says in the environment how many processes there are; Lightning takes their number per node as ``devices``
and the number of machines as ``num_nodes``, and would let each of them do the whole work if told otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from deferral_train.errors import InputError

INTERACTIVE = ("bash", "interactive")  # SLURM job names of a shell, from which nothing was launched


@dataclass(frozen=True)
class Launch:
    """Place of this process among all: ``rank``, ``local_rank`` on its node, ``devices`` per node, ``num_nodes``."""

    rank: int = 0
    local_rank: int = 0
    devices: int = 1
    num_nodes: int = 1


def launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Rank and number of processes from the environment of torchrun or srun; None where neither started us.

    Raises:
        InputError: nodes with different numbers of processes.
    """
    given = os.environ if environment is None else environment
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    if all(name in given for name in names):  # vLLM, in this process, sets some of them
        rank, local, per_node, processes = (int(given[name]) for name in names)
    elif (
        "SLURM_NTASKS" in given and given.get("SLURM_JOB_NAME") not in INTERACTIVE and "SLURM_PROCID" in given
    ):
        rank, local = int(given["SLURM_PROCID"]), int(given.get("SLURM_LOCALID", "0"))
        processes = int(given["SLURM_NTASKS"])
        per_node = processes // int(given.get("SLURM_NNODES", "1"))
    else:
        return None
    if per_node < 1 or processes % per_node:
        raise InputError(f"{processes} processes do not spread evenly over nodes; start as many on each")
    return Launch(rank, local, per_node, processes // per_node)


def processes(devices: int, num_nodes: int) -> tuple[int, int]:
    """Processes per node and nodes: the launcher's where there is one, else as asked for.

    Raises:
        InputError: what was asked for is neither 1 nor what was launched.
    """
    launched = launch()
    if launched is None:
        return devices, num_nodes
    if (devices, num_nodes) not in ((1, 1), (launched.devices, launched.num_nodes)):
        raise InputError(
            f"devices={devices}, num_nodes={num_nodes}: the launcher started {launched.devices} processes on each of "
            f"{launched.num_nodes} nodes; leave both out, or start as many"
        )
    return launched.devices, launched.num_nodes
