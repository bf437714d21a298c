"""Trace folders with what a breakdown asks of them beyond their rows: the prompts' ids, a domain per prompt, what the
models are.

Traces hold no prompts, only their ids and a hash; the prompts are read again from their file, matched by id, encoded as
they were and checked against that hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train.collecting.plan import prompts_hash
from deferral_train.errors import InputError
from deferral_train.pairs.encode import EncodedPrompt, encode_prompts
from deferral_train.pairs.fingerprint import tokenizer_fingerprint
from deferral_train.pairs.prompts import read_prompts
from deferral_train.traces import Traces
from deferral_train.traces.manifest import is_count

FOLDER, ID = "folder", "id"  # domains that need no field of the prompts


@dataclass(frozen=True)
class Part:
    """One trace folder.

    Attributes:
        name: of the folder.
        traces: opened.
        architecture: of its pair, in words.
        drafter_size: parameters, None where unknown.
        prompt_ids: token ids of each prompt by its id; None where the prompts were not read.
        special: ids that are no text.
        domains: of each prompt by its id.
    """

    name: str
    traces: Traces
    architecture: str
    drafter_size: int | None
    prompt_ids: Mapping[str, list[int]] | None
    special: frozenset[int]
    domains: Mapping[str, str]

    @property
    def separate(self) -> bool:
        """True for encoder-decoder models, whose text does not continue the prompt."""
        return bool(self.traces.manifest.pair.get("is_encoder_decoder"))


def read_part(
    traces: Traces,
    name: str,
    prompts: str | Path | None = None,
    tokenizers: Sequence[Any] = (),
    domain: str = FOLDER,
    *,
    format: str | None = None,
    prompt_field: str | None = None,
    split: str = "train",
) -> Part:
    """A trace folder and, with ``prompts``, the prompts that it was collected from.

    Args:
        name: of the folder.
        prompts: the file that ``collect`` read; ``format``, ``prompt_field`` and ``split`` as there.
        tokenizers: among them the one of the traces, known by its fingerprint.
        domain: ``folder``; ``id``, the part of a prompt's id before the first ``/``, ``#`` or ``:``; else a field of
            the prompts.

    Raises:
        InputError: a prompt that is not in the file, another text than was collected from, no fitting tokenizer,
            a field that is not there.
    """
    ids, special = None, frozenset[int]()
    if prompts is not None and tokenizers:
        tokenizer = _fitting(tokenizers, traces, name)
        ids = _encoded(traces, name, prompts, tokenizer, format, prompt_field, split)
        special = frozenset(tokenizer.all_special_ids)
    return Part(
        name,
        traces,
        *_architecture(traces),
        ids,
        special,
        _domains(traces, name, prompts, domain, format, split),
    )


def _fitting(tokenizers: Sequence[Any], traces: Traces, name: str) -> Any:
    wanted = traces.manifest.pair.get("tokenizer")
    known = {tokenizer_fingerprint(tokenizer): tokenizer for tokenizer in tokenizers}
    if wanted not in known:
        raise InputError(
            f"tokenizer: the traces {name} were made with tokenizer {str(wanted)[:12]}, given "
            f"{', '.join(found[:12] for found in known)}; name a checkpoint of their pair"
        )
    return known[wanted]


def _encoded(
    traces: Traces,
    name: str,
    prompts: str | Path,
    tokenizer: Any,
    format: str | None,
    prompt_field: str | None,
    split: str,
) -> dict[str, list[int]]:
    manifest = traces.manifest
    settings = manifest.settings
    template = settings.get("template", "{prompt}")
    rows = read_prompts(prompts, format, prompt_field=prompt_field, template=template, split=split)
    by_id = {row.id: row for row in rows}
    missing = [found for found in manifest.prompt_ids if found not in by_id]
    if missing:
        raise InputError(
            f"prompts: {prompts} has no prompt {missing[0]!r}, which the traces {name} have ({len(missing)} of "
            f"{len(manifest.prompt_ids)} are missing); give the file that they were collected from"
        )
    encoded = encode_prompts(
        tokenizer,
        [by_id[found] for found in manifest.prompt_ids],
        is_encoder_decoder=bool(manifest.pair.get("is_encoder_decoder")),
        chat=settings.get("chat", "auto"),
    )
    kept = {row.id: row.input_ids for row in encoded.kept}
    _check_hash(traces, name, prompts, kept)
    return kept


def _check_hash(traces: Traces, name: str, prompts: str | Path, kept: Mapping[str, list[int]]) -> None:
    """Refuse other texts under the same ids. References are in the traces: every row's token is one of theirs."""
    manifest = traces.manifest
    recorded = manifest.prompts.get("sha256")
    on_policy = manifest.prefixes != "reference"
    unknown = traces.nonfinite or not traces.complete
    if recorded is None or (unknown and not on_policy) or manifest.labels.get("kind") == "autojudge":
        return  # engine traces have no hash; elsewhere it covers references that the rows do not hold
    references: dict[int, list[int]] = {}
    if not on_policy:
        for number, token in zip(traces.prompt_of_row.tolist(), traces.column("token").tolist()):
            references.setdefault(number, []).append(token)
    now = [
        EncodedPrompt(found, kept.get(found, []), references.get(number, []))
        for number, found in enumerate(manifest.prompt_ids)
    ]
    if prompts_hash(now, on_policy) != recorded:
        raise InputError(
            f"prompts: {prompts} holds other texts than the traces {name} were collected from, under the same ids; "
            "give that file, its prompt_field and its split"
        )


def _domains(
    traces: Traces, name: str, prompts: str | Path | None, domain: str, format: str | None, split: str
) -> dict[str, str]:
    ids = traces.prompt_ids
    if domain == FOLDER:
        return dict.fromkeys(ids, name)
    if domain == ID:
        return {found: _stem(found) for found in ids}
    if prompts is None:
        raise InputError(f"domain={domain!r} is a field of the prompts; give prompts, or use folder or id")
    labels = {row.id: row.prompt for row in read_prompts(prompts, format, prompt_field=domain, split=split)}
    missing = [found for found in ids if found not in labels]
    if missing:
        raise InputError(
            f"prompts: {prompts} has no prompt {missing[0]!r}, which the traces {name} have; give the file that "
            "they were collected from"
        )
    return {found: labels[found] for found in ids}


def _stem(prompt: str) -> str:
    places = [place for mark in "/#:" if (place := prompt.find(mark)) > 0]
    return prompt[: min(places)] if places else prompt


def _architecture(traces: Traces) -> tuple[str, int | None]:
    """The models in words, and the drafter's parameters; headers may come from elsewhere and say less."""
    pair = traces.manifest.pair
    words: list[str] = []
    sizes: list[int | None] = []
    for role in ("drafter", "verifier"):
        facts = _mapping(_mapping(traces.manifest.provenance.get("models")).get(role))
        kind = facts.get("model_type") or (
            "encoder-decoder" if pair.get("is_encoder_decoder") else "decoder-only"
        )
        size = facts.get("parameters")
        sizes.append(size if is_count(size) else None)
        known = sizes[-1]
        words.append(
            f"{kind} {_mapping(pair.get(role)).get('name', role) if known is None else size_words(known)}"
        )
    return f"{words[0]} under {words[1]}", sizes[0]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def size_words(parameters: int) -> str:
    """``380k``, ``2.1M``, ``7.2B`` parameters."""
    for unit, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{word}"
    return str(parameters)
