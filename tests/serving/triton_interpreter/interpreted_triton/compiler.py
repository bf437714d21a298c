"""The compiler half of a Triton backend: there, and never asked to compile, since kernels are interpreted."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class Interpreted(BaseBackend):
    """A backend for the target ``cpu``."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> Any:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict, options: Any, *rest: Any) -> None:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """Nothing to load."""

    def get_module_map(self) -> dict:
        return {}
