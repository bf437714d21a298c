"""The header of a trace folder, ``manifest.json``.

It is written once, before the first shard, and fixes everything that decides the bytes of the shards: pair, prompts,
prefixes, chunks with their seeds and batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deferral_train.errors import InputError
from deferral_train.traces.folder import Folder
from deferral_train.traces.kinds import JUDGE_LABELS, PREFIX_SOURCES, SEQUENCE_LABELS
from deferral_train.traces.schema import READABLE_VERSIONS, RELEASES, SCHEMA_VERSION, Layout

HEADER = "manifest.json"
MOST_METRICS = 64
WIDEST = 1 << 20  # most candidates or hidden numbers of a row
# Say how an output came to be or where a checkpoint lies, not what it is: free to differ between runs.
# Hashes of texts are new in a folder that was begun without them; that the prompts are the same, `prompts` says.
FREE = frozenset({"provenance", "name", "revision", "prompt_hashes"})


@dataclass(frozen=True)
class Chunk:
    """The unit of work and of storage: some prompts, their seed and how they are batched.

    Attributes:
        id: place in the manifest; the shard is ``shard-<id>.arrow``.
        seed: of everything random in this chunk.
        batches: prompt numbers of each batch, in order of work.
    """

    id: int
    seed: int
    batches: tuple[tuple[int, ...], ...]

    @property
    def file(self) -> str:
        return f"shard-{self.id:05d}.arrow"

    @property
    def prompts(self) -> list[int]:
        """The chunk's prompt numbers, ascending: the order of its rows."""
        return sorted(number for batch in self.batches for number in batch)


@dataclass(frozen=True)
class Manifest:
    """Header of a trace folder.

    Attributes:
        pair: fingerprints of drafter, verifier and tokenizer, vocabulary size, dtype.
        prefixes: ``reference``, ``drafter``, ``verifier`` or ``cascade:<rule>``.
        temperature: of the sampling distributions that ``tv`` compares (and of sampled prefixes); 0 is greedy.
        top_k: K, logged candidates of each model.
        hidden: width by role of the logged hidden states.
        truth: None, ``teacher`` or ``exact``.
        labels: ``kind`` and how they were made; empty for none. Of judged tokens (`JUDGE_LABELS`) also ``hidden``,
            width of the state logged with them; of ``sequence`` also ``metrics`` and their ``scales``.
        seed: base seed; each chunk's own is derived from it.
        chunking: prompts per chunk and padded tokens per batch.
        prompt_ids: ids of the prompts that are logged; a row's ``prompt`` is an index into them.
        prompt_hashes: hash of each prompt's text, in the order of ``prompt_ids``; empty where the texts are unknown.
        chunks: the work, complete: the folder is finished when each has a line in the ledger.
        prompts: hash of the encoded prompts, and what was left out or cut, with reasons.
        settings: everything else that decides the bytes (token limits, rule, teacher, ...).
        provenance: command line, versions, revision, machine, time.
    """

    pair: Mapping[str, Any]
    prefixes: str
    prompt_ids: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    temperature: float = 1.0
    top_k: int = 0
    hidden: Mapping[str, int] = field(default_factory=dict)
    truth: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    chunking: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    prompt_hashes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.prefixes not in PREFIX_SOURCES and not self.prefixes.startswith("cascade:"):
            raise InputError(f"prefixes={self.prefixes!r}: use {', '.join(PREFIX_SOURCES)} or cascade:<rule>")

    @property
    def layout(self) -> Layout:
        """The optional columns of the shards."""
        cascade = self.prefixes.startswith("cascade:")
        judged = int(self.labels.get("hidden", 0))
        sequence = len(self.labels.get("metrics", ()))
        hidden = dict(self.hidden)
        return Layout(
            self.top_k, hidden, self.truth is not None, cascade, judged, sequence, self.schema_version,
            bool(sequence) and self.labels.get("form") == "token",
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Plain values, in reading order, the long lists last."""
        value = asdict(self)
        value["chunks"] = [[chunk.seed, chunk.batches] for chunk in self.chunks]
        order = ["schema_version", "prefixes", "temperature", "top_k", "hidden", "truth", "labels", "seed"]
        order += ["chunking", "settings", "pair", "provenance", "prompts", "prompt_ids"]
        order += [*(["prompt_hashes"] if self.prompt_hashes else []), "chunks"]
        return {name: value[name] for name in order}

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Manifest:
        version = value.get("schema_version")
        if version not in READABLE_VERSIONS:
            release = RELEASES.get(version) if isinstance(version, int) else None
            remedy = (
                f"use release {release}" if release else "use the release of deferral-train that wrote it"
            )
            readable = ", ".join(map(str, READABLE_VERSIONS))
            raise InputError(f"schema_version={version}: this release reads {readable}; {remedy}")
        _check_header(value)
        chunks = tuple(
            Chunk(number, seed, tuple(tuple(batch) for batch in batches))
            for number, (seed, batches) in enumerate(value["chunks"])
        )
        _check_chunks(chunks, len(value["prompt_ids"]))
        lists = {name: tuple(value.get(name, ())) for name in ("prompt_ids", "prompt_hashes")}
        return cls(**{**value, "chunks": chunks, **lists})


def require(holds: bool, problem: str) -> None:
    """ValueError(problem) unless it holds; what reads a folder from elsewhere turns it into an InputError."""
    if not holds:
        raise ValueError(problem)


def is_count(value: Any, most: int = 2**62) -> bool:
    """True for a JSON value that is a whole number from 0 to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _check_header(value: Mapping[str, Any]) -> None:
    """Types and sizes of a header that may come from elsewhere; nothing is allocated by what it claims."""
    for name in ("pair", "hidden", "labels", "chunking", "prompts", "settings", "provenance"):
        require(isinstance(value.get(name, {}), dict), f"{name} is no object")
    require(isinstance(value["prefixes"], str), "prefixes is no text")
    require(isinstance(value.get("truth"), str | None), "truth is no text")
    temperature = value.get("temperature", 1.0)
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    require(number and 0 <= temperature < math.inf, "temperature is no number >= 0")
    require(is_count(value.get("top_k", 0), WIDEST), f"top_k is no count up to {WIDEST}")
    for role, size in value.get("hidden", {}).items():
        require(is_count(size, WIDEST) and size > 0, f"hidden.{role} is no width up to {WIDEST}")
    labels = value.get("labels", {})
    _check_labels(labels)
    ids = value["prompt_ids"]
    require(isinstance(ids, list) and all(isinstance(i, str) for i in ids), "prompt_ids is no list of texts")
    require(len(set(ids)) == len(ids), "prompt_ids repeat")
    hashes = value.get("prompt_hashes", [])
    texts = isinstance(hashes, list) and all(isinstance(digest, str) for digest in hashes)
    require(
        texts and len(hashes) in (0, len(ids)), "prompt_hashes is no list of one text for each of prompt_ids"
    )


def _check_labels(labels: Mapping[str, Any]) -> None:
    """Kind of the labels, and what fixes the columns that they fill."""
    kinds = (*JUDGE_LABELS, SEQUENCE_LABELS)
    require(not labels or labels.get("kind") in kinds, f"labels.kind is none of {kinds}")
    metrics, scales = labels.get("metrics", []), labels.get("scales", [])
    if labels.get("kind") == SEQUENCE_LABELS:
        require(
            isinstance(metrics, list) and 0 < len(metrics) <= MOST_METRICS,
            "labels.metrics is no list of names",
        )
        require(all(isinstance(name, str) for name in metrics), "labels.metrics is no list of names")
        positive = [isinstance(one, int | float) and 0 < one < math.inf for one in scales]
        require(
            len(positive) == len(metrics) and all(positive), "labels.scales is no positive number per metric"
        )
        return
    require(not metrics, "labels.metrics belong to sequence labels")
    size = labels.get("hidden", 0)
    require(is_count(size, WIDEST) and (size > 0 or not labels), f"labels.hidden is no width up to {WIDEST}")


def _check_chunks(chunks: tuple[Chunk, ...], prompts: int) -> None:
    for chunk in chunks:
        require(isinstance(chunk.seed, int), f"chunk {chunk.id} has no seed")
        known = all(is_count(number, prompts - 1) for batch in chunk.batches for number in batch)
        require(known, f"chunk {chunk.id} names a prompt that is not listed")


def write_header(folder: Folder, manifest: Manifest) -> None:
    """Write ``manifest.json``: readable at the top, one line per long list."""
    value = json.loads(json.dumps(manifest.as_json()))
    lines = [f"  {json.dumps(name)}: {_block(name, item)}" for name, item in value.items()]
    folder.write(HEADER, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _block(name: str, item: Any) -> str:
    if name in ("prompt_ids", "prompt_hashes", "chunks"):
        return json.dumps(item, separators=(",", ":"))
    return json.dumps(item, indent=2, ensure_ascii=False).replace("\n", "\n  ")


def read_header(folder: Folder) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        InputError: not a trace folder, a damaged header, or a schema version that this release does not read.
    """
    if folder.size(HEADER) is None:
        raise InputError(f"{folder} is not a trace folder (no {HEADER}); give the --out of a collect run")
    try:
        value = json.loads(folder.read(HEADER))
        require(isinstance(value, dict), "no object")
        return Manifest.parse(value)
    except InputError as error:
        raise InputError(f"{folder}/{HEADER}: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder}/{HEADER} is damaged ({str(error)[:100]}); collect into a new folder"
        ) from error


def differences(before: Manifest, now: Manifest) -> list[str]:
    """Differences of two headers, as ``name: before -> now``; empty where one can continue the other."""
    plain = json.loads(json.dumps([before.as_json(), now.as_json()]))
    return list(_compare(plain[0], plain[1], ""))


def _compare(before: Any, now: Any, path: str) -> Iterable[str]:
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if key in FREE:
                continue
            yield from _compare(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list):
        yield (
            f"{path}: {len(before)} -> {len(now)} entries"
            if len(before) != len(now)
            else f"{path}: entries differ"
        )
    else:
        yield f"{path}: {before} -> {now}"
