"""Reads the value of ``--drafting``: a short form for one drafter, a YAML file for anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train.decoding.drafting.bigrams import BigramTable
from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.decoding.drafting.plan import Plan
from deferral_train.errors import InputError
from deferral_train.heads.rules import parse_spec

# Name -> K from tokens and copies: what the verifier reviews, and what Max-Gram proposes below or behind it.
SHORT = {
    "max_gram": lambda tokens, copies: ((tokens,),),
    "vertical": lambda tokens, copies: ((tokens, 0), (0, copies)),
    "horizontal": lambda tokens, copies: ((tokens, copies), (0, 0)),
    "both": lambda tokens, copies: ((tokens, copies), (0, copies)),
}
OPTIONS = ("lenience", "match", "least", "bigrams")


@dataclass(frozen=True)
class DraftingSpec:
    """A plan, and the checkpoints of the drafters below the pair's own, largest first."""

    plan: Plan
    smaller: tuple[str, ...] = ()


def drafting_from_spec(spec: str) -> DraftingSpec:
    """``vertical:tokens=4,copies=10`` (or max_gram, horizontal, both), or the path of a YAML file.

    Further keys of both forms: lenience, match, least, bigrams (a file). The file has ``k`` in place of tokens and
    copies, and ``smaller``, a list of checkpoints.

    Raises:
        InputError: an unknown name or key, a value that cannot be meant.
    """
    if spec.endswith((".yaml", ".yml")):
        given = _read(Path(spec))
        known: tuple[str, ...] = ("k", "smaller", *OPTIONS)
    else:
        name, given = parse_spec(spec)
        if name not in SHORT:
            raise InputError(f"drafting {spec!r} is unknown; use {', '.join(SHORT)}, or a .yaml file with k")
        tokens, copies = given.pop("tokens", 4), given.pop("copies", 10)
        given["k"] = SHORT[name](tokens, copies)
        known = ("k", *OPTIONS)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"drafting {spec!r} has no key {unknown[0]!r}; known: {', '.join(known)}")
    smaller = given.get("smaller", ())
    if isinstance(smaller, str) or not all(isinstance(path, str) for path in smaller):
        raise InputError(f"drafting {spec!r}: smaller is {smaller!r}; give a list of checkpoints")
    return DraftingSpec(_plan(spec, given), tuple(smaller))


def _plan(spec: str, given: Mapping[str, Any]) -> Plan:
    k = given.get("k")
    if not isinstance(k, list | tuple) or not all(isinstance(row, list | tuple) for row in k):
        raise InputError(f"drafting {spec!r}: k is {k!r}; give a square matrix, e.g. [[4, 0], [0, 10]]")
    bigrams = BigramTable.load(given["bigrams"]) if given.get("bigrams") else None
    max_gram = None
    if any(row and row[-1] for row in k):
        max_gram = MaxGram(given.get("match", "earliest"), given.get("least", 1), bigrams)
    return Plan(k, given.get("lenience", 1.0), max_gram)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise InputError(f"drafting: no file {path}")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"drafting: {path} is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(given, dict):
        raise InputError(f"drafting: {path} holds no keys; give k: [[4, 0], [0, 10]] and what else differs")
    return given
