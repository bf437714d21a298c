"""Settings of the plug-in: of the engine, from ``additional_config``, and of a request, from ``vllm_xargs``.

Knows nothing about vLLM. Every refusal is one line that names the field, its value and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from deferral_train.errors import InputError
from deferral_train.rules.base import Rule

KEY = "deferral"  # of additional_config
PREFIX = "deferral_"  # of a request's extra arguments
MODES = ("serve", "shadow")


@dataclass(frozen=True)
class LogConfig:
    """Trace logging from live traffic.

    Attributes:
        folder: trace folder to write; it must be new.
        fraction: share of requests that are logged, chosen by a hash of the request's id.
        max_bytes: logging stops before the folder grows beyond this.
        queue: blocks that may wait for the writing thread; a request whose block finds it full is dropped.
        rows_per_shard: rows that a shard gathers.
        top_k: K, logged candidates of each model.
        hidden: log both models' hidden states too.
        temperature: of the column ``tv``; 0 is greedy.
        text: also keep the prompts' token ids, in ``prompts.jsonl``. Off: nothing of a request's text but the ids of
            generated tokens is written.
        wait: hold up the engine while the queue is full rather than drop: for corpora, never for users.
        names: requests may say what traces call them (``deferral_name``): for corpora.
        resume: continue a folder that was written with the same settings.
        settings: anything else that decides the rows, kept in the header; a folder is continued under the same alone.
    """

    folder: str
    fraction: float = 0.1
    max_bytes: int = 1 << 30
    queue: int = 256
    rows_per_shard: int = 8192
    top_k: int = 0
    hidden: bool = False
    temperature: float = 1.0
    text: bool = False
    wait: bool = False
    names: bool = False
    resume: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str) or not self.folder:
            raise InputError("deferral.log.folder is empty; name a folder for the traces")
        if not 0 < self.fraction <= 1:
            raise InputError(f"deferral.log.fraction is {self.fraction}; use a share above 0 and at most 1")
        for name in ("max_bytes", "queue", "rows_per_shard"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(
                    f"deferral.log.{name} is {getattr(self, name)!r}; use a whole number above 0"
                )
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"deferral.log.top_k is {self.top_k!r}; use 0 (no candidates) or more")
        if not isinstance(self.settings, Mapping):
            raise InputError(f"deferral.log.settings is {self.settings!r}; write an object")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"deferral.log.temperature is {self.temperature}; use a finite number >= 0")


@dataclass(frozen=True)
class ServingConfig:
    """The plug-in's part of ``additional_config``.

    Attributes:
        rule: a rule as on the command line, ``"opt:alpha=0.2"`` or ``"learned:head=FOLDER,alpha=0.1"``.
        head: folder of an exported head, in place of a rule.
        alpha: of the head; default the one stored in it.
        mode: ``"serve"``, or ``"shadow"``: serve lossless and count what the rule would have done.
        max_request_loss: limit on each request's estimated loss, in units of the rule's estimate; requests may ask
            for less, not for more.
        dial_range: [lowest, highest] value of the rule's dial that a request may ask for; default the rule's range.
        guard: [lowest, highest] estimated loss per token of a request; one that leaves the band is served lossless from
            there on. A head knows the traffic that it was fitted on; other traffic shows in this number first.
        guard_after: tokens that a request has been given before its loss per token is judged.
        log: trace logging.
        shadow_file: JSON file that shadow mode keeps up to date with what switching on would bring; `report` shows it.
    """

    rule: str | None = None
    head: str | None = None
    alpha: float | None = None
    mode: str = "serve"
    max_request_loss: float | None = None
    dial_range: tuple[float, float] | None = None
    guard: tuple[float, float] | None = None
    guard_after: int = 32
    log: LogConfig | None = None
    shadow_file: str | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and self.head is not None:
            raise InputError("deferral: both a rule and a head are given; leave one out")
        if self.rule is None and self.head is None and self.log is None:
            raise InputError("deferral: nothing to do; give a rule, a head, or a log")
        if self.alpha is not None and self.head is None:
            raise InputError('deferral.alpha belongs to a head; write "rule": "NAME:alpha=..." for a rule')
        if self.mode not in MODES:
            raise InputError(f"deferral.mode is {self.mode!r}; use one of {', '.join(MODES)}")
        if self.shadow_file is not None and self.mode != "shadow":
            raise InputError(f'deferral.shadow_file belongs to "mode": "shadow"; mode is {self.mode!r}')
        _check_limit("deferral.max_request_loss", self.max_request_loss)
        for name in ("dial_range", "guard"):
            ends = getattr(self, name)
            if ends is not None and not ends[0] <= ends[1]:
                raise InputError(f"deferral.{name} is {list(ends)}; write [lowest, highest]")
        if (
            isinstance(self.guard_after, bool)
            or not isinstance(self.guard_after, int)
            or self.guard_after < 1
        ):
            raise InputError(f"deferral.guard_after is {self.guard_after!r}; use a whole number above 0")

    @classmethod
    def parse(cls, value: Any) -> ServingConfig:
        """Settings from the JSON value under ``additional_config["deferral"]``.

        Raises:
            InputError: an unknown key, or a value of the wrong type or range.
        """
        given = dict(_mapping("deferral", value))
        _refuse_unknown("deferral", given, cls)
        if given.get("log") is not None:
            log = dict(_mapping("deferral.log", given["log"]))
            _refuse_unknown("deferral.log", log, LogConfig)
            if "folder" not in log:
                raise InputError("deferral.log.folder is not given; name a folder for the traces")
            given["log"] = LogConfig(**{key: _number("deferral.log." + key, log[key]) for key in log})
        for key in ("dial_range", "guard"):
            ends = given.get(key)
            if ends is None:
                continue
            if not isinstance(ends, list | tuple) or len(ends) != 2:
                raise InputError(f"deferral.{key} is {ends!r}; write [lowest, highest]")
            given[key] = tuple(_real(f"deferral.{key}", end) for end in ends)
        for key in ("alpha", "max_request_loss"):
            if given.get(key) is not None:
                given[key] = _real(f"deferral.{key}", given[key])
        for key in ("rule", "head", "mode", "shadow_file"):
            if given.get(key) is not None and not isinstance(given[key], str):
                raise InputError(f"deferral.{key} is {given[key]!r}; write a text")
        return cls(**given)

    @property
    def spec(self) -> str:
        """The rule as text: what traces and log lines call it."""
        if self.head is not None:
            return f"learned:head={self.head}" + ("" if self.alpha is None else f",alpha={self.alpha!r}")
        return self.rule or "lossless"

    def make_rule(self) -> Rule:
        """The configured rule; reads the head.

        Raises:
            InputError: an unknown rule, a parameter out of range, a head that cannot be read.
        """
        from deferral_train.heads.rules import rule_from_spec

        return rule_from_spec(self.spec)


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request, from its ``vllm_xargs``.

    Attributes:
        lossless: serve this request lossless.
        dial: value of the rule's dial for this request.
        max_request_loss: limit on this request's estimated loss.
        name: what traces call this request, where the server lets requests name themselves.
    """

    lossless: bool = False
    dial: float | None = None
    max_request_loss: float | None = None
    name: str | None = None

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """Options from a request's extra arguments; names without our prefix are ignored.

        Raises:
            InputError: an unknown name with our prefix, or a wrong value.
        """
        given = {key: value for key, value in (extra_args or {}).items() if key.startswith(PREFIX)}
        known = [PREFIX + field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(f"{unknown[0]} is unknown; a request may say {', '.join(known)}")
        lossless = given.get(PREFIX + "lossless", False)
        if isinstance(lossless, str) or lossless not in (False, True, 0, 1):
            raise InputError(f"{PREFIX}lossless is {lossless!r}; use true or false (over HTTP 1 or 0)")
        dial, limit = given.get(PREFIX + "dial"), given.get(PREFIX + "max_request_loss")
        options = cls(
            bool(lossless),
            None if dial is None else _real(PREFIX + "dial", dial),
            None if limit is None else _real(PREFIX + "max_request_loss", limit),
            given.get(PREFIX + "name"),
        )
        if options.name is not None and not isinstance(options.name, str):
            raise InputError(f"{PREFIX}name is {options.name!r}; write a text")
        _check_limit(PREFIX + "max_request_loss", options.max_request_loss)
        return options

    def admit(self, config: ServingConfig, rule: Rule) -> None:
        """Refuse options that the server does not grant.

        Raises:
            InputError: a dial that the rule has not or that is out of range, a limit above the server's.
        """
        if self.dial is not None:
            low, high = config.dial_range or (-math.inf, math.inf)
            if not low <= self.dial <= high:
                raise InputError(f"{PREFIX}dial is {self.dial:g}; this server allows {low:g} to {high:g}")
            rule.with_dial(self.dial)
        if self.name is not None and not (config.log is not None and config.log.names):
            raise InputError(f"{PREFIX}name: this server's requests do not name their traces; leave it out")
        most = config.max_request_loss
        if most is not None and self.max_request_loss is not None and self.max_request_loss > most:
            raise InputError(
                f"{PREFIX}max_request_loss is {self.max_request_loss:g}; this server allows at most {most:g}"
            )


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {value!r}; write an object, as in docs/serving_vllm.md")
    return value


def _refuse_unknown(name: str, given: Mapping[str, Any], cls: type) -> None:
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"{name}.{unknown[0]} is unknown; known: {', '.join(known)}")


def _number(name: str, value: Any) -> Any:
    """Values of the log's table: the numeric ones must be numbers, the others pass."""
    if name.rpartition(".")[2] in ("fraction", "temperature"):
        return _real(name, value)
    if name.rpartition(".")[2] in ("hidden", "text", "wait", "names", "resume") and not isinstance(
        value, bool
    ):
        raise InputError(f"{name} is {value!r}; use true or false")
    return value


def _real(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InputError(f"{name} is {value!r}; use a finite number")
    return number


def _check_limit(name: str, limit: float | None) -> None:
    if limit is not None and limit < 0:
        raise InputError(f"{name} is {limit:g}; use a number >= 0")
