"""Do the traces of a fit belong together: one pair, one temperature, one truth, and no prompt on two sides?"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deferral_train.errors import InputError
from deferral_train.traces import Traces
from deferral_train.traces.manifest import FREE

PAIR = ("tokenizer", "vocab_size", "is_encoder_decoder", "drafter", "verifier")
NUMBERED = re.compile(
    r".*:\d+", re.DOTALL
)  # an id that reading a file without ids made of its name and the row

log = logging.getLogger(__name__)


def refuse_strangers(
    first: Traces, others: Sequence[tuple[str, Traces]], truth: str, temperature: float | None
) -> None:
    """Refuse traces that cannot be fitted on, or judged, together with ``first``.

    Args:
        first: the traces that are fitted on.
        others: name of the flag and traces, of every further set.
        truth: what labels the gap; of a teacher, it must be the same one.
        temperature: at which all are read; None takes each at its own, which must be one.

    Raises:
        InputError: another pair, temperature or teacher, by name.
    """
    keys = (*PAIR, "teacher") if truth == "teacher" else PAIR
    ours = first.manifest
    for name, part in others:
        theirs = part.manifest
        for key in keys:
            if key in ours.pair and key in theirs.pair:
                for field, before, now in _differences(ours.pair[key], theirs.pair[key], key):
                    raise InputError(
                        f"data.{name}: traces of another pair, {field} is {now}, the first train traces' {before}; "
                        "collect all with one pair"
                    )
        if temperature is None and theirs.temperature != ours.temperature:
            raise InputError(
                f"data.{name}: traces at temperature {theirs.temperature:g}, the first train traces at "
                f"{ours.temperature:g}; collect all at one, or set data.temperature"
            )


def refuse_other_candidates(first: Traces, others: Sequence[tuple[str, Traces]]) -> None:
    """Refuse another number of logged candidates where a head learns from them."""
    for name, part in others:
        if part.manifest.top_k != first.manifest.top_k:
            raise InputError(
                f"data.{name}: {part.manifest.top_k} logged candidates a row, the first train traces "
                f"{first.manifest.top_k}; collect all with one --log-top-k"
            )


def _differences(before: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Places at which two fingerprints differ, of what both state; a name or a revision is no difference."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before:
            if key in now and key not in FREE:
                yield from _differences(before[key], now[key], f"{path}.{key}")
    elif type(before) is type(now) and before != now:
        yield path, before, now


def refuse_shared_prompts(fitted: Sequence[Traces], judged: Mapping[str, Traces]) -> None:
    """Refuse prompts that are fitted on and judged on: the same text, under whatever id.

    Where the traces hold no hashes of texts only ids are compared, and a line says so. Where they do, equal ids that
    were made of a file's name and the row are no sign: two files of one name are not one text.

    Raises:
        InputError: how many, and the first.
    """
    hashes = {name: digest for part in fitted for name, digest in part.prompt_hashes.items()}
    owner = {digest: name for name, digest in hashes.items()}
    ids = {name for part in fitted for name in part.prompt_ids}
    blind = 0
    for split, part in judged.items():
        shared = []
        for name in part.prompt_ids:
            digest = part.prompt_hashes.get(name)
            blind += digest is None or (name in ids and name not in hashes)
            if digest in owner:
                shared.append(name if owner[digest] == name else f"{name} (there {owner[digest]})")
            elif name in ids and not (NUMBERED.fullmatch(name) and digest is not None and name in hashes):
                shared.append(name)
        if shared:
            raise InputError(
                f"{len(shared)} prompts are in both train and {split} traces, first {min(shared)}; "
                "split by prompt: a head must not be judged on what it was fitted on"
            )
    if blind or len(hashes) < len(ids):
        log.warning(
            "fit: some traces hold no hashes of their prompts' texts: overlap was looked for by id alone"
        )
