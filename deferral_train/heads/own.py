"""User-defined head classes: imported where the user typed the name, never where a file names it."""

from __future__ import annotations

import importlib
import json
import os
import sys

from deferral_train.errors import InputError
from deferral_train.heads.base import HEADS, DeferralHead, head_from_config


def import_head_class(name: str) -> type[DeferralHead]:
    """Import a head class named ``my_heads.MyHead`` or ``my_heads:MyHead``, from the current folder, too.

    Raises:
        InputError: no such module or class, or no head.
    """
    module_name, _, class_name = name.replace(":", ".").rpartition(".")
    if not module_name:
        raise InputError(f"head class {name!r}: write module and class, such as my_heads.MyHead")
    find_modules_here()
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"head class {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, DeferralHead)):
        raise InputError(f"head class {name!r} is no DeferralHead; name a class that is derived from it")
    return found


def find_modules_here() -> None:
    """Let modules in the current folder be imported, after all installed ones, as ``python -m`` does for its own."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def check_own_class(head: DeferralHead) -> None:
    """Refuse a head of a class of the user's own that could be trained but not loaded again.

    Raises:
        InputError: a type name that is taken, or a constructor that cannot be called with what the config holds.
    """
    cls = type(head)
    if HEADS.get(getattr(cls, "head_type", "")) is cls:
        return
    if getattr(cls, "head_type", None) is None or cls.head_type in HEADS:
        raise InputError(
            f"{cls.__name__}: head_type is {getattr(cls, 'head_type', None)!r}; give the class a head_type of its own, "
            f"none of {', '.join(HEADS)}"
        )
    try:
        again = head_from_config(json.loads(json.dumps(head.stored_config())), cls)
    except (TypeError, InputError) as error:
        raise InputError(
            f"{cls.__name__}: cannot be built again from its config ({error}), no export of it could be loaded; "
            "take the arguments of DeferralHead and no others"
        ) from error
    shapes = [{name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (head, again)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{cls.__name__}: built again from its config it has other weights; set sizes from the config"
        )


def class_name(head: DeferralHead) -> str | None:
    """The name by which a class of the user's own is given again; None for a class of the package."""
    cls = type(head)
    return None if HEADS.get(cls.head_type) is cls else f"{cls.__module__}.{cls.__qualname__}"
