"""Does a head belong to this pair? Another vocabulary never works; other weights only where the user accepts
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from deferral_train.decoding.stopping import StopDrafting
from deferral_train.errors import InputError
from deferral_train.heads.artifact import certificate_problem
from deferral_train.heads.pairing import check_vocabulary, different, fitted_parts, role_of
from deferral_train.rules.base import Rule

ROLES = ("drafter", "verifier")


def heads_of(rule: Rule, stop: StopDrafting | None = None) -> list[Any]:
    """The learned heads, and tables, that a rule or a stop rule asks."""
    return [part for owner in (rule, stop) for part in fitted_parts(owner)]


def check_head(
    head: Any,
    fingerprints: Mapping[str, Any],
    facts: Mapping[str, Any],
    accept_mismatch: bool = False,
) -> list[str]:
    """Compare what the head recorded with the pair that it is to serve.

    Args:
        head: an object with ``metadata`` ({"pair": fingerprints, "certificate": ...}); one without is not
            checked.
        fingerprints: of the loaded pair: ``drafter``, ``verifier``, ``tokenizer``.
        facts: what else is so here: ``vocab_size``, ``dtype``, ``quantization``, ``temperature``.
        accept_mismatch: go on with other weights, number formats or temperatures.

    Returns:
        The mismatches that were accepted, in words; empty where everything agrees.

    Raises:
        InputError: a mismatch that was not, or cannot be, accepted.
    """
    metadata = getattr(head, "metadata", None) or {}
    recorded = dict(metadata.get("pair") or {})
    check_vocabulary(head, {**fingerprints, **facts})
    certificate = metadata.get("certificate")
    certified = certificate.get("pair") if isinstance(certificate, Mapping) else None
    loose = [*roles_differ(recorded, fingerprints), *different(recorded, facts, ("dtype", "quantization"))]
    if isinstance(certified, Mapping):
        loose += [f"certified {text}" for text in roles_differ(certified, fingerprints) if text not in loose]
    loose += list(_temperature_differs(metadata, facts))
    loose += [problem] if (problem := certificate_problem(head)) else []
    if loose and not accept_mismatch:
        raise InputError(
            f"{role_of(head)}: {'; '.join(loose)}; make it anew, or accept with --accept-mismatch"
        )
    return loose


def roles_differ(recorded: Mapping[str, Any], fingerprints: Mapping[str, Any]) -> Iterator[str]:
    """Models whose config or weights are not those recorded, in words; what one side does not state is not compared."""
    for role in ROLES:
        theirs, ours = recorded.get(role), fingerprints.get(role)
        if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
            continue
        for part in ("config", "weights"):
            if part in theirs and part in ours and theirs[part] != ours[part]:
                yield f"{role} {part} is {ours[part]}, the head's {theirs[part]}"
        if theirs.get("adapter") != ours.get("adapter"):
            yield f"{role} adapter is {ours.get('adapter')}, the head's {theirs.get('adapter')}"


def _temperature_differs(metadata: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    certificate = metadata.get("certificate")
    if not isinstance(certificate, Mapping) or "temperature" not in certificate or "temperature" not in facts:
        return
    if float(certificate["temperature"]) != float(facts["temperature"]):
        yield f"temperature {facts['temperature']} is not the certified {certificate['temperature']}"


class Consulted:
    """Stands before a head and counts how often it was asked; everything else is the head's own."""

    QUESTIONS = frozenset({"gap", "token_gap", "tv", "defer", "truth", "score", "verifier_truth"})

    def __init__(self, head: Any) -> None:
        self._head = head
        self.times = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._head, name)
        if name not in Consulted.QUESTIONS:
            return value

        def asked(*arguments: Any, **named: Any) -> Any:
            self.times += 1
            return value(*arguments, **named)

        return asked


def with_counting(rule: Rule, stop: StopDrafting | None) -> tuple[Rule, StopDrafting | None, list[Consulted]]:
    """The same rules with counters before their heads."""
    counters: list[Consulted] = []
    if getattr(rule, "head", None) is not None and not rule.is_lossless:  # lossless ends ask nobody
        counters.append(Consulted(rule.head))  # type: ignore[attr-defined]
        rule = replace(rule, head=counters[-1])  # type: ignore[call-arg]
    if stop is not None and getattr(stop, "head", None) is not None:
        counters.append(Consulted(stop.head))  # type: ignore[attr-defined]
        stop = replace(stop, head=counters[-1])  # type: ignore[type-var]
    return rule, stop, counters


def check_consulted(counters: list[Consulted], drafted: int) -> None:
    """A head that was configured but never asked is a defect, not a result.

    Raises:
        RuntimeError: tokens were drafted and a head was not asked once.
    """
    if drafted and any(counter.times == 0 for counter in counters):
        raise RuntimeError(f"a head is configured but was never consulted over {drafted} drafted tokens")
