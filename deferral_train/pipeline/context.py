"""The half of a run that its stages read: its folder, its config, and what earlier stages settled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from deferral_train.pipeline.config import RunConfig
from deferral_train.pipeline.decoder import StageDecoder
from deferral_train.traces import Traces

# Stage -> its result, of the stages that are done.
Results = Mapping[str, Any]


class RunContext(Protocol):
    """A run as its stages see it; :class:`deferral_train.pipeline.run.Run` is one."""

    config: RunConfig
    folder: Path

    @property
    def asks(self) -> bool:
        """True for a run that asks questions about a database of its own."""

    @property
    def metric(self) -> str:
        """Metric of quality, per prompt."""

    def open(self, part: str) -> Traces:
        """Traces of a part of the text."""

    def collecting(self, pair: Mapping[str, Any], part: str) -> dict[str, Any]:
        """Fields of the `CollectConfig` for a part."""

    def decoded(self, results: Results) -> dict[str, str]:
        """Label to spec of the rules that are decoded."""

    def decoder(self, pair: Mapping[str, Any]) -> StageDecoder:
        """The thing that decodes with the pair, whose stage's result is given."""

    def chosen(self, results: Results) -> dict[str, Any]:
        """The operating point that the run chose."""
