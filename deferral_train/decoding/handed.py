"""Arguments that ``generate`` is given and hands to no callable: streamer, tokenizer of stop strings, an assistant.

transformers sets these aside for its own modes and then asks a callable's signature for what else belongs to it. This
signature answers with their names too, and puts them back among the arguments that are looked through for them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType, MappingProxyType
from typing import Any

NAMES = {"streamer": "token_streamer", "tokenizer": "tokenizer", "assistant_model": "assistant_model"}


class HandedSignature(inspect.Signature):
    """The signature of a function for ``custom_generate``, which is handed what ``generate`` was given."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> HandedSignature:
        """The signature of ``function``, which takes any named argument."""
        plain = inspect.signature(function)
        return cls(list(plain.parameters.values()), return_annotation=plain.return_annotation)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:  # type: ignore[override]
        """As written; asked by ``generate``, also the names of what it set aside."""
        plain = dict(super().parameters)
        more: dict[str, inspect.Parameter] = {}
        frame = _asked_by_generate(sys._getframe(1))
        if frame is not None:
            arguments, aside = frame.f_locals.get("kwargs"), frame.f_locals.get("generation_mode_kwargs")
            for theirs, ours in NAMES.items():
                if isinstance(arguments, dict) and isinstance(aside, dict) and aside.get(theirs) is not None:
                    arguments.setdefault(ours, aside[theirs])
                    more[ours] = inspect.Parameter(ours, inspect.Parameter.KEYWORD_ONLY, default=None)
        # Behind what is written and before ``**``: functools.partial makes a signature of these, in this order.
        last = {name: one for name, one in plain.items() if one.kind is inspect.Parameter.VAR_KEYWORD}
        first = {name: one for name, one in plain.items() if name not in last}
        return MappingProxyType({**first, **{k: v for k, v in more.items() if k not in first}, **last})


def _asked_by_generate(frame: FrameType | None) -> FrameType | None:
    """The frame of ``generate`` that looks for a callable's arguments; ``functools.partial`` may stand between."""
    for _ in range(8):
        if frame is None or frame.f_code.co_name == "_extract_generation_mode_kwargs":
            return frame
        frame = frame.f_back
    return None
