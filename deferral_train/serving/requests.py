"""State of each request in the engine: its rule, its loss limit and the loss spent, and if it is logged.

Kept by request id beside the engine's own state, from what its scheduler says, so that it survives preemption;
forgotten when the scheduler reports a request as finished.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deferral_train.errors import InputError
from deferral_train.rules import Rule
from deferral_train.serving.blocks import GREEDY_BELOW, RowSettings
from deferral_train.serving.config import RequestOptions, ServingConfig

MOST_DIALS = (
    64  # values of requests' own that are remembered: anybody who may ask can send any number of them
)


@dataclass
class ServedRequest:
    """State of one request in the engine.

    Attributes:
        settings: rule, limit on the estimated loss, and the loss spent so far.
        refused: why the configured rule is not in force: "asked", "temperature", "pair", "options", or, from some token
            on, "guard"; None where it is.
        logged: True where its blocks go to the traces.
        name: its name in the traces; None for the engine's id.
        temperature: its sampling temperature. prompt_length: tokens of its prompt.
        judged: tokens that it was given in blocks that the rule decided.
    """

    settings: RowSettings
    refused: str | None
    logged: bool
    name: str | None = None
    temperature: float = 0.0
    prompt_length: int = 0
    judged: int = 0

    @property
    def ruled(self) -> bool:
        """True where a rule decides about its drafts."""
        return not self.settings.rule.is_lossless

    @property
    def idle(self) -> bool:
        """True where the engine's own sampler gives the same: no rule is in force and nothing is logged."""
        return not self.ruled and not self.logged

    def spend(self, loss: float) -> None:
        """Add the estimated loss of a block to what the request has spent."""
        self.settings = RowSettings(self.settings.rule, self.settings.limit, self.settings.spent + loss)

    def leaves(self, band: tuple[float, float], after: int) -> bool:
        """True once the estimated loss per token is outside of ``band``, from ``after`` tokens on."""
        return self.judged >= after and not band[0] <= self.settings.spent / self.judged <= band[1]

    def refuse(self, reason: str) -> None:
        """Serve the request lossless from here on."""
        self.settings, self.refused = RowSettings(spent=self.settings.spent), reason


STRANGER = ServedRequest(RowSettings(), None, False)


class Requests:
    """All requests that this worker has met.

    Args:
        config: the plug-in's settings.
        rule: the configured rule.
        mismatch: why the rule's head is not for this pair; empty where it is.
    """

    def __init__(self, config: ServingConfig, rule: Rule, mismatch: Iterable[str] = ()) -> None:
        self.config, self.rule, self.mismatch = config, rule, list(mismatch)
        self.certified = _certified_temperature(rule)
        self.conditions: list[str] = []  # what differs from what the head was certified on
        self._known: dict[str, ServedRequest] = {}
        self._dialled: dict[float, Rule] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, name: str) -> ServedRequest:
        """The state of a request; one without any rule where nobody told of it (the engine's warm-up)."""
        return self._known.get(name, STRANGER)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def of(self, name: str, temperature: float, extra_args: Mapping[str, Any] | None) -> ServedRequest:
        """The state of a request, made when it is first seen."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = self._admit(name, temperature, extra_args)
        return known

    def forget(self, names: Iterable[str]) -> list[str]:
        """Drop finished requests; returns those that were known."""
        return [name for name in names if self._known.pop(name, None) is not None]

    def _admit(self, name: str, temperature: float, extra_args: Mapping[str, Any] | None) -> ServedRequest:
        logged = self.config.log is not None and chosen(name, self.config.log.fraction)
        try:
            options = RequestOptions.parse(extra_args)
            options.admit(self.config, self.rule)
        except InputError:  # refused at the front door; a request that came round it is served lossless
            return ServedRequest(RowSettings(), "options", logged, temperature=temperature)
        refused = self._refused(options, temperature)
        if refused is not None:
            return ServedRequest(RowSettings(), refused, logged, options.name, temperature)
        limit = self.config.max_request_loss if options.max_request_loss is None else options.max_request_loss
        settings = RowSettings(self._at(options.dial), limit)
        return ServedRequest(settings, None, logged, options.name, temperature)

    def _refused(self, options: RequestOptions, temperature: float) -> str | None:
        if options.lossless:
            return "asked"
        if self.mismatch:
            return "pair"
        temperature = 0.0 if temperature < GREEDY_BELOW else temperature
        if self.certified is not None and temperature != self.certified:
            return "temperature"
        return None

    def _at(self, dial: float | None) -> Rule:
        if dial is None or self.rule.dial is None:
            return self.rule
        if dial not in self._dialled:
            if len(self._dialled) >= MOST_DIALS:
                del self._dialled[next(iter(self._dialled))]
            self._dialled[dial] = self.rule.with_dial(dial)
        return self._dialled[dial]


def chosen(name: str, fraction: float) -> bool:
    """True where a request is in the logged share ``fraction``, by a hash of its id: the same on every rank."""
    return zlib.crc32(name.encode()) < fraction * 2**32


def _certified_temperature(rule: Rule) -> float | None:
    """The temperature that the certificate of the rule's head speaks of; None without one."""
    metadata = getattr(getattr(rule, "head", None), "metadata", None) or {}
    certificate = metadata.get("certificate")
    if isinstance(certificate, Mapping) and "temperature" in certificate:
        return float(certificate["temperature"])
    return None
