"""Counts what a computation asks of an accelerator: operators launched, and copies to the host.

Works on plain CPU tensors. There a copy to the host is what would be one elsewhere: reading a number (`.item()`,
`.tolist()`, `bool(tensor)`), an operator whose result's shape depends on the data. On a device of its own type (the
pretend accelerator of the tests, CUDA) transfers are told from their devices.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Views and bookkeeping: no kernel runs.
VIEWS = frozenset(
    {
        *(
            "view",
            "_unsafe_view",
            "_reshape_alias",
            "reshape",
            "expand",
            "permute",
            "transpose",
            "t",
            "select",
        ),
        *("slice", "squeeze", "unsqueeze", "split", "split_with_sizes", "unbind", "alias", "as_strided"),
        *("detach", "movedim", "unfold", "diagonal", "narrow", "lift_fresh", "is_pinned", "empty"),
        *(
            "empty_strided",
            "empty_like",
            "new_empty",
            "resize_",
            "set_",
            "view_as",
            "expand_as",
            "unsafe_split",
        ),
    }
)
# The host waits for the device: numbers that Python reads, and shapes that depend on the data.
READS = frozenset({"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item"})
COPIES = frozenset({"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"})


class LaunchCounter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        operators: how often each operator ran, views left out; copies to the host are not among them.
        copies: how often each operator copied from a device to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    @property
    def launches(self) -> int:
        """Operators in all."""
        return self.operators.total()

    @property
    def host_copies(self) -> int:
        """Copies to the host in all."""
        return self.copies.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS or (name in COPIES and _to_host(name, args, kwargs)):
            self.copies[name] += 1
        elif name not in VIEWS and torch.Tag.inplace_view not in func.tags:
            # Indexing with a mask looks for its places first.
            masks = [one for one in _indices(name, args) if one is not None and one.dtype == torch.bool]
            self.copies.update(["masked index"] * bool(masks))
            self.operators[name] += 1
        return func(*args, **kwargs)


def _indices(name: str, args: tuple) -> list[Any]:
    return list(args[1]) if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []


def _to_host(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a copy goes from a device to the host; on the CPU alone none does."""
    if name == "_to_copy":
        source, target = args[0].device, kwargs.get("device")
        return source.type != "cpu" and target is not None and torch.device(target).type == "cpu"
    if name == "copy_":
        return args[0].device.type == "cpu" and args[1].device.type != "cpu"
    return args[0].device.type != "cpu" and args[1].device.type == "cpu"
