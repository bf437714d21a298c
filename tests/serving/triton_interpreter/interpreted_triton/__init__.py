"""Triton's interpreter for vLLM's V2 kernels on a CPU: for tests only, on PYTHONPATH of their own processes.

Where vLLM sees this backend it takes the V2 runner for its default, so that it must not be seen by the V1 tests.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point of vLLM's plug-ins: mend what Triton 3.9's interpreter lacks for these kernels, and quicken it."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_interpreted_triton"):
        interpreter._interpreted_triton = True  # type: ignore[attr-defined]
        _keep_masks(interpreter)
        _give_log1p(interpreter)
        _avoid_the_truncation_kernel()
        _quicken(interpreter)


def _keep_masks(interpreter: Any) -> None:
    """A comparison's result is a mask; the interpreter labels it with the operands' type, and widens it later."""
    import numpy as np
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    binary_op = builder.binary_op

    def labelled(self: Any, left: Any, right: Any, operation: Any) -> Any:
        result = binary_op(self, left, right, operation)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    builder.binary_op = labelled


def _give_log1p(interpreter: Any) -> None:
    """The interpreter has no library of device functions."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice

    def log1p(value: Any) -> Any:
        handle = interpreter.TensorHandle(np.log1p(value.handle.data), value.handle.dtype)
        return tl.tensor(handle, value.type)

    libdevice.log1p = log1p


def _avoid_the_truncation_kernel() -> None:
    """Top-k and top-p by PyTorch: their kernel calls a method of a loop variable, which is a plain number here."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def _quicken(interpreter: Any) -> None:
    """Patch ``triton.language`` once per module rather than at each launch; look for no overflows; types once each."""
    patch, seen = interpreter._patch_lang, set()
    of_type, known = interpreter._get_np_dtype, {}

    def of_type_once(kind: Any) -> Any:
        name = str(kind)  # pointers have no hash
        if name not in known:
            known[name] = of_type(kind)
        return known[name]

    interpreter._get_np_dtype = of_type_once

    class Kept:
        def restore(self) -> None:
            """Leave the patch in place."""

    def patch_once(function: Any) -> Kept:
        module = id(function.__globals__)
        if module not in seen:
            seen.add(module)
            patch(function)
        return Kept()

    interpreter._patch_lang = patch_once
    interpreter.interpreter_builder.options.__dict__["sanitize_overflow"] = False
