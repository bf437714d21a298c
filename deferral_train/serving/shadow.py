"""Shadow mode's results: lossless serving against the rule's outcome, summed over requests in a JSON file.

Blocks of one request resemble each other, so that intervals must come from whole requests: of each rule the file holds
sums and sums of products over requests of four numbers, from which means, ratios and their standard errors follow.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from deferral_train import provenance
from deferral_train.rules import Rule
from deferral_train.serving.blocks import Outcome, RowSettings
from deferral_train.serving.requests import MOST_DIALS

log = logging.getLogger("vllm.deferral_train")
SCHEMA_VERSION = 1
COLUMNS = ("blocks", "served", "shadow", "loss")  # drafted tokens that stand: as served, and under the rule
WRITE_SECONDS = 10.0


class Shadow:
    """Numbers of requests that the rule was for.

    Args:
        path: the file; None where nothing is written.
        spec: the configured rule. label: of this engine.
    """

    def __init__(self, path: str | None, spec: str, rule: Rule, label: str = "0") -> None:
        self.spec, self.rule, self.label = spec, rule, label
        self.path = None
        if path is not None:
            given = Path(path)
            self.path = given if label == "0" else given.with_name(f"{given.stem}-{label}{given.suffix}")
        self._labels: set[str] = set()  # of requests' own dials
        self._open: dict[str, tuple[str, np.ndarray]] = {}
        self._sums: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}
        self._written = time.monotonic()

    def add(
        self, names: Sequence[str], settings: Sequence[RowSettings], served: Outcome, shadow_outcome: Outcome
    ) -> None:
        """Add one step's blocks, as they were served and as the rule would have decided them."""
        if self.path is None:
            return
        stands, losses = shadow_outcome.accepted.tolist(), shadow_outcome.loss.tolist()
        for name, row, *numbers in zip(names, settings, served.accepted.tolist(), stands, losses):
            if not row.rule.is_lossless:
                if name not in self._open:
                    self._open[name] = (self._named(row.rule), np.zeros(len(COLUMNS)))
                self._open[name][1][:] += (1, *numbers)

    def finished(self, names: Iterable[str]) -> None:
        """Add finished requests to the sums; the file is written at most every `WRITE_SECONDS`."""
        for name in names:
            self._close(name)
        if self.path is not None and time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def close(self) -> None:
        """Count what is still open as it is, and write."""
        for name in list(self._open):
            self._close(name)
        if self.path is not None:
            self.write()

    def write(self) -> None:
        """Write the JSON file; a failure goes to the log and harms no request."""
        self._written = time.monotonic()
        rules = {
            label: {"requests": count, "sums": sums.tolist(), "products": products.tolist()}
            for label, (count, sums, products) in self._sums.items()
        }
        found = {
            "kind": "shadow",
            "schema_version": SCHEMA_VERSION,
            "columns": list(COLUMNS),
            "rules": rules,
            "engine": self.label,
            "updated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        try:
            assert self.path is not None
            self.path.parent.mkdir(parents=True, exist_ok=True)
            provenance.write_json(self.path, found)
        except OSError as error:
            log.error("deferral: %s was not written: %s", self.path, error.strerror or error)

    def _named(self, rule: Rule) -> str:
        """The configured rule by its spec, at a request's own dial by that."""
        if rule.dial is None or rule.dial_value == self.rule.dial_value:
            return self.spec
        label = f"{self.spec} at {rule.dial.parameter}={rule.dial_value!r}"
        if label not in self._labels and len(self._labels) >= MOST_DIALS:
            return f"{self.spec} at other dials"
        self._labels.add(label)
        return label

    def _close(self, name: str) -> None:
        label, numbers = self._open.pop(name, ("", None))
        if numbers is None:
            return
        count, sums, products = self._sums.get(
            label, (0, np.zeros(len(COLUMNS)), np.zeros((len(COLUMNS), len(COLUMNS))))
        )
        self._sums[label] = (count + 1, sums + numbers, products + np.outer(numbers, numbers))
