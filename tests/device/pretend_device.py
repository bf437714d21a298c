"""A pretend accelerator for tests on machines without one: ``install()``, then ``device="sim"`` (or ``"sim:1"``).

Its memory is the host's and its operators run on the CPU, but what a GPU refuses it refuses: two devices in one
operator, a CPU generator for a device tensor, ``.numpy()`` on a device tensor. PyTorch must meet it before the first
backward pass of a process (its engine counts devices once), and registering one changes what
``torch.accelerator`` answers; hence the suites that use it run in processes of their own (``test_on_device.py``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import types
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("pretend_device.cpp")
BUILDS = Path(__file__).resolve().parents[2] / "build" / "pretend_device"
DEVICES = 2


class UnavailableError(RuntimeError):
    """The device cannot be built here; the message says why."""


def compiler() -> str | None:
    """The C++ compiler of this machine, ``$CXX`` first; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def library() -> Path:
    """The built extension, built first where this torch and source have none: once, under a lock, in half a minute.

    Raises:
        UnavailableError: no compiler, or it refuses.
    """
    from filelock import FileLock  # torch depends on it
    from torch.utils.cpp_extension import include_paths, library_paths

    identity = (
        SOURCE.read_bytes() + torch.__version__.encode() + str(torch.compiled_with_cxx11_abi()).encode()
    )
    built = BUILDS / f"pretend_device_{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if built.exists():
        return built
    program = compiler()
    if program is None:
        raise UnavailableError("no C++ compiler (c++ or g++, or name one in CXX)")
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(built) + ".lock"):
        if built.exists():
            return built
        unfinished = built.with_suffix(".part")
        command = [program, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(SOURCE), "-o", str(unfinished)]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [f"-I{path}" for path in include_paths()]
        for path in library_paths():
            command += [f"-L{path}", f"-Wl,-rpath,{path}"]
        done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"{shlex.join(command[:2])} failed: {done.stderr.strip()[-2000:]}")
        unfinished.replace(built)
    return built


@functools.cache
def install() -> None:
    """Register the device with this process, once.

    Raises:
        UnavailableError: it cannot be built here.
    """
    path = library()
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _module())
    torch.ops.load_library(str(path))
    torch.utils.generate_methods_for_privateuse1_backend()


def _module() -> Any:
    """``torch.sim``: what PyTorch and transformers ask an accelerator's module."""
    ops = torch.ops.pretend_device
    module: Any = types.ModuleType("torch.sim")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: DEVICES
    module.current_device = lambda: 0
    module.device = module.set_device = lambda *_: contextlib.nullcontext()
    module.synchronize = module.empty_cache = lambda *_: None
    module.manual_seed = module.manual_seed_all = lambda seed: ops.seed(int(seed) & (2**63 - 1))
    module.get_rng_state = lambda device=0: ops.get_state(_index(device))
    module.set_rng_state = lambda state, device=0: ops.set_state(_index(device), state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


def _index(device: Any) -> int:
    return device if isinstance(device, int) else (torch.device(device).index or 0)
