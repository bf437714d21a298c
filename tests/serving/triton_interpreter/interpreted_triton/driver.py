"""The driver half of a Triton backend: the CPU, always there."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Interpreter(DriverBase):
    """A driver whose device is the CPU."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("kernels are interpreted: there is nothing to time")
