"""One-line errors, without secrets. Knows nothing about the rest of the package."""

from __future__ import annotations

import contextlib
import importlib
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deferral_train.redaction import redacted_text

LONGEST = 1000
# Import name -> the extra that brings it.
EXTRAS = {
    "transformers": "train",
    "pytorch_lightning": "train",
    "datasets": "train",
    "sklearn": "train",
    "torchmetrics": "train",
    "tensorboard": "train",
    "jsonargparse": "train",
    "sacrebleu": "train",
    "jinja2": "train",
    "matplotlib": "train",
    "scipy": "train",
    "pandas": "train",
    "yaml": "train",
    "rich": "train",
    "fsspec": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "vllm": "vllm",
    "accelerate": "accelerate",
    "peft": "peft",
    "gguf": "gguf",
}


def one_line(text: str, longest: int = LONGEST) -> str:
    """``text`` as one printable line: a value from a file may hold line ends, terminal escapes or megabytes.

    What is too long loses its middle, because the field stands at the front and the remedy at the end.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"
    text = " ".join(text.split())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """Something the user can mend: the message names the field, the value and the remedy, in one line.

    The command line prints the message without a traceback and exits with 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted_text(message)))


class MissingExtraError(InputError):
    """A command was asked for whose optional dependencies are not installed.

    Args:
        module: the import that failed, for example ``"transformers"``.
        extra: the extra that brings it, for example ``"train"``.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; run: pip install 'deferral-train[{extra}]'")
        self.module = module
        self.extra = extra


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError:
    """The error that says what to install for an absent module; one that no extra brings is raised again."""
    top = (error.name or "").split(".")[0]
    if top not in EXTRAS:
        raise error
    return MissingExtraError(top, EXTRAS[top])


def names_on_first_use(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of a package that imports its names when they are first asked for, so that importing it is light.

    Args:
        package: its ``__name__``.
        home: name to the module of the package that defines it.

    Returns:
        a function that raises AttributeError for other names, and MissingExtraError where an extra is not installed.
    """

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        except ModuleNotFoundError as error:
            raise missing_extra(error) from None

    return find


@contextlib.contextmanager
def config_errors(prefix: str = "") -> Iterator[None]:
    """Turns what jsonargparse raises on a config or flags that do not fit into an InputError.

    Besides its own error it lets through those of the YAML reader and of the file system, and a TypeError where a
    section holds a single value.
    """
    try:
        yield
    except (ArgumentError, ValueError, RecursionError) as error:
        raise InputError(f"{prefix}{error}") from None
    except TypeError:
        raise InputError(
            f"{prefix}a section holds a single value or a list; write its fields as key: value"
        ) from None
