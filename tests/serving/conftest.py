"""The plug-in's tests. Those marked `engine` start vLLM itself and run where it is installed: make test-vllm.

An engine has its V1 or its V2 runner for the life of a process. Tests marked `v2` run in one of their own, whose
environment makes vLLM see Triton's interpreter (triton_interpreter/); where it is not seen they are skipped, and where
it is seen all other tests of an engine are.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

HERE = Path(__file__).parent
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling the engine's log-probability ranks takes longer than all the tests
}
if importlib.util.find_spec("vllm") is not None:  # elsewhere other tests share the process, and some compile
    os.environ.update({name: os.environ.get(name, value) for name, value in ENGINE_ENVIRONMENT.items()})


V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = importlib.util.find_spec("vllm") is None
    for item in items:
        if HERE not in Path(item.path).parents or not item.get_closest_marker("engine"):
            continue
        if absent:
            reason = "THE ENGINE WAS NOT TESTED HERE: vLLM is not installed; run make test-vllm"
        elif bool(item.get_closest_marker("v2")) != V2:
            reason = "this process has vLLM's other model runner; make test-vllm runs both"
        else:
            continue
        item.add_marker(pytest.mark.skip(reason=reason))
