"""Check that a head or a table was made for the pair's vocabulary: its ids mean other tokens under another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deferral_train.errors import InputError


def fitted_parts(owner: Any) -> list[Any]:
    """The head or the table that a rule (or a rule that stops drafting) decides by; none for a formula."""
    found = [getattr(owner, name, None) for name in ("head", "table")]
    return [part for part in found if part is not None]


def role_of(part: Any) -> str:
    """How messages call such a part."""
    return str(getattr(part, "role", "head"))


def different(recorded: Mapping[str, Any], here: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    """Texts ``NAME is HERE, the head's RECORDED`` of the entries of ``names`` that both sides state and that differ."""
    for name in names:
        if name in recorded and name in here and recorded[name] != here[name]:
            yield f"{name} is {here[name]}, the head's {recorded[name]}"


def check_vocabulary(head: Any, pair: Mapping[str, Any]) -> None:
    """Refuse a head of another tokenizer or vocabulary than ``pair`` (as a manifest or a loaded pair states it).

    Raises:
        InputError: they differ; a head that recorded no pair is not checked.
    """
    recorded = dict((getattr(head, "metadata", None) or {}).get("pair") or {})
    found = list(different(recorded, pair, ("tokenizer", "vocab_size")))
    if found:
        role = role_of(head)
        raise InputError(
            f"{role}: made for another vocabulary ({'; '.join(found)}); use a {role} of this pair"
        )
