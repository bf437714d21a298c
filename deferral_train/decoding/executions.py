"""The ways to execute a cascade, by the name that users give."""

from __future__ import annotations

from collections.abc import Callable

from deferral_train.decoding.loop import Cascade, speculative

EXECUTIONS: dict[str, Callable[[Cascade], None]] = {
    "speculative": speculative,
}
