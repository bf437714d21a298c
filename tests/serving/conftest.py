"""The plug-in's tests. Those marked `engine` start vLLM itself and run where it is installed: make test-vllm."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    reason = "THE ENGINE WAS NOT TESTED HERE: vLLM is not installed; run make test-vllm"
    for item in items:
        if HERE in Path(item.path).parents and item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason=reason))
