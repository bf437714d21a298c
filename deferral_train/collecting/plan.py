"""The work before any model runs: encoded prompts, chunks with seeds and batches, manifest, estimate."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train import provenance
from deferral_train.collecting.config import HIDDEN, CollectConfig
from deferral_train.errors import InputError, MissingExtraError
from deferral_train.pairs.checkpoint import contents_of
from deferral_train.pairs.encode import EncodedPrompt, encode_prompts
from deferral_train.pairs.fingerprint import model_facts
from deferral_train.pairs.load import ModelPair
from deferral_train.pairs.overlap import content_hash
from deferral_train.pairs.positions import PositionLimits, room_of
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.traces import Chunk, Manifest
from deferral_train.traces.folder import open_folder
from deferral_train.traces.kinds import JUDGE_LABELS, SEQUENCE_LABELS

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
TEXTS_TOGETHER = (
    8  # times as many tokens in a batch whose texts are finished: branches of one column run together
)
BATCH_LOGITS = 1 << 28  # most logits of one model in a batch


@dataclass(frozen=True)
class CollectionPlan:
    """Prompts by number and the manifest that fixes what is done with them.

    Attributes:
        prompts: encoded prompts; a row's ``prompt`` is an index into them.
        manifest: header of the trace folder.
        rows: most token rows each chunk can have (exact on references).
    """

    prompts: tuple[EncodedPrompt, ...]
    manifest: Manifest
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.rows)

    def chunk_bytes(self, chunk: int) -> int:
        """Most bytes a chunk's shard can take."""
        return self.rows[chunk] * self._sizes[0] + self._sizes[1]

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Bytes per row and per shard."""
        layout = self.manifest.layout
        return layout.row_bytes, layout.shard_bytes


def read_any_prompts(config: CollectConfig) -> list[Prompt]:
    """Prompts from a local file, a data set name, or a file at an fsspec address."""
    with tempfile.TemporaryDirectory() as scratch:
        places = [
            None if path is None else _local(path, Path(scratch) / str(number))
            for number, path in enumerate((config.prompts, config.reference_path))
        ]
        assert places[0] is not None
        return read_prompts(
            places[0],
            config.prompt_format,
            reference_path=places[1],
            prompt_field=config.prompt_field,
            reference_field=config.reference_field,
            template=config.template,
            subset=config.subset,
            split=config.split,
            limit=config.limit,
        )


def _local(path: str, scratch: Path) -> str:
    if "://" not in path:
        return path
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("fsspec", "train") from error
    target = scratch / path.rsplit("/", 1)[-1]
    target.parent.mkdir(parents=True)
    try:
        with fsspec.open(path, "rb") as source:
            target.write_bytes(source.read())
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"prompts: {path} cannot be read ({error}); check the address") from error
    return str(target)


def make_plan(
    config: CollectConfig,
    pair: ModelPair,
    prompts: Sequence[Prompt],
    teacher: ModelPair | None,
    handed_over: bool = False,
    engine: Mapping[str, Any] | None = None,
) -> CollectionPlan:
    """Encode the prompts, leave out and name what cannot be used, and fix chunks, seeds and batches.

    Args:
        handed_over: the pair was in memory before, so that ``config``'s folders do not say what it holds.
        engine: facts of a serving engine that finishes texts.

    Raises:
        InputError: no prompt can be used.
    """
    kept, notices = _encode(config, pair, prompts)
    batch_tokens = config.batch_tokens or default_batch_tokens(pair.device.type, pair.vocab_size)
    if config.labels == SEQUENCE_LABELS and config.batch_tokens is None:
        batch_tokens *= TEXTS_TOGETHER
    chunks = tuple(
        Chunk(number, _chunk_seed(config.seed, number), _batches(config, kept, numbers, batch_tokens))
        for number, numbers in enumerate(_ranges(len(kept), config.chunk_prompts))
    )
    texts_decide = not config.on_policy or config.labels in ("autojudge", SEQUENCE_LABELS)  # references, too
    judged = {"hidden": hidden_width(pair.verifier)} if config.labels in JUDGE_LABELS else {}
    manifest = Manifest(
        pair=_describe(pair, teacher),
        prefixes=config.prefix_name,
        prompt_ids=tuple(prompt.id for prompt in kept),
        prompt_hashes=_text_hashes(prompts, kept),
        chunks=chunks,
        temperature=float(config.temperature),
        top_k=min(config.log_top_k, pair.vocab_size),
        hidden={role: hidden_width(getattr(pair, role)) for role in HIDDEN[config.hidden]},
        truth="teacher" if teacher else None,
        labels=config.label_settings | judged | _unit_scales(config),
        seed=config.seed,
        chunking={"chunk_prompts": config.chunk_prompts, "batch_tokens": batch_tokens},
        prompts={"sha256": prompts_hash(kept, not texts_decide), "given": len(prompts), **notices},
        settings=config.deciding()
        | {
            "contents": contents(config, pair if handed_over else None)
            | _label_contents(config, prompts, kept)
        }
        | ({} if engine is None else {"engine": dict(engine)}),
        provenance=provenance.collect({"seed": config.seed})
        | {"models": {role: model_facts(getattr(pair, role)) for role in ("drafter", "verifier")}},
    )
    most = config.new_tokens or 0
    rows = [sum(most if config.on_policy else len(kept[n].reference_ids) for n in c.prompts) for c in chunks]
    return CollectionPlan(tuple(kept), manifest, tuple(rows))


def _unit_scales(config: CollectConfig) -> dict[str, Any]:
    """Scales of sequence labels as far as they are known before a first look at the texts."""
    if config.labels != SEQUENCE_LABELS:
        return {}
    return {"scales": [float(one) for one in config.label_scales or [1.0] * len(config.metrics)]}


def _label_contents(
    config: CollectConfig, prompts: Sequence[Prompt], kept: Sequence[EncodedPrompt]
) -> dict[str, Any]:
    """Inputs of labels of finished texts besides the models: files that metrics name, references as texts."""
    if config.labels not in ("autojudge", SEQUENCE_LABELS):
        return {}
    texts = {prompt.id: prompt.reference for prompt in prompts}
    named = provenance.metric_contents(config.metrics)
    return {"references": provenance.hash_of([texts[prompt.id] for prompt in kept])} | (
        {"metrics": named} if named else {}
    )


def contents(config: CollectConfig, pair: ModelPair | None = None) -> dict[str, Any]:
    """Content keys of the models and of a cascade's rule, see :func:`deferral_train.pairs.checkpoint.contents_of`.

    Args:
        pair: models in memory; without, what lies in the config's folders.
    """
    named: dict[str, Any] = {role: getattr(config, role) for role in ("drafter", "verifier", "teacher")}
    if pair is not None:
        named |= {"drafter": pair.drafter, "verifier": pair.verifier}
    return contents_of(named, config.rule)


def _encode(
    config: CollectConfig, pair: ModelPair, prompts: Sequence[Prompt]
) -> tuple[list[EncodedPrompt], dict[str, Any]]:
    room = room_of((pair.drafter, pair.verifier))
    most = _longest_prompt(config, pair, room)
    encoded = encode_prompts(
        pair.tokenizer,
        prompts,
        is_encoder_decoder=pair.is_encoder_decoder,
        chat=config.chat,
        max_prompt_tokens=most,
        max_reference_tokens=None if config.on_policy else config.new_tokens,
        require_reference=not config.on_policy,
    )
    kept, skipped = [], [[notice.id, notice.reason] for notice in encoded.skipped]
    for prompt in encoded.kept:
        reason = None if config.on_policy else _unusable_reference(prompt, room, pair.is_encoder_decoder)
        if reason:
            skipped.append([prompt.id, reason])
        else:
            kept.append(prompt)
    if not kept:
        raise InputError(
            f"prompts: none of {len(prompts)} can be used; first: prompt {skipped[0][0]}: {skipped[0][1]}"
            + ("" if config.on_policy else "; without references, use prefixes drafter, verifier or cascade")
        )
    return kept, {"skipped": skipped, "cut": [[notice.id, notice.reason] for notice in encoded.cut]}


def _text_hashes(prompts: Sequence[Prompt], kept: Sequence[EncodedPrompt]) -> tuple[str, ...]:
    """Hash of each kept prompt's text alone: a prompt that was learned from is known by what it asks."""
    texts = {prompt.id: prompt.prompt for prompt in prompts}
    return tuple(content_hash(texts[prompt.id]) for prompt in kept)


def _longest_prompt(config: CollectConfig, pair: ModelPair, room: PositionLimits) -> int | None:
    """Most tokens of a prompt that leave room for what follows; None for no bound.

    Raises:
        InputError: more new tokens than the models can place.
    """
    new = config.new_tokens or 1 if config.on_policy else 1
    if room.text is not None and new >= room.text + pair.is_encoder_decoder:
        raise InputError(
            f"max_new_tokens={new}: the models place {room.text} tokens; use at most "
            f"{room.text - (not pair.is_encoder_decoder)}"
        )
    if pair.is_encoder_decoder:
        bound = room.prompt
    else:
        bound = None if room.text is None else room.text - new
    known = [size for size in (config.max_prompt_tokens, bound) if size is not None]
    return min(known, default=None)


def _unusable_reference(prompt: EncodedPrompt, room: PositionLimits, is_encoder_decoder: bool) -> str | None:
    if not prompt.reference_ids:
        return "empty reference"
    total = len(prompt.reference_ids) + (0 if is_encoder_decoder else len(prompt.input_ids))
    # The last token is predicted, never fed; an encoder-decoder model is fed a start token besides.
    if room.text is not None and total - (not is_encoder_decoder) > room.text:
        return f"{total} tokens with its reference, more than the models' {room.text} positions"
    return None


def hidden_width(model: Any) -> int:
    """Width D of a model's last hidden state."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def default_batch_tokens(device: str, vocab_size: int) -> int:
    """Padded tokens per batch: enough to keep the device busy, few enough that the logits fit."""
    most = BATCH_TOKENS["cpu" if device == "cpu" else "cuda"]
    return max(1, min(most, BATCH_LOGITS // vocab_size))


def _chunk_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _ranges(count: int, size: int) -> list[range]:
    return [range(at, min(at + size, count)) for at in range(0, count, size)]


def _batches(
    config: CollectConfig, prompts: Sequence[EncodedPrompt], numbers: range, most: int
) -> tuple[tuple[int, ...], ...]:
    """Prompts of like length together; padded size is a batch's count times its longest prompt and prefix."""

    def size(n: int) -> tuple[int, int]:
        after = config.new_tokens or 0 if config.on_policy else len(prompts[n].reference_ids)
        return len(prompts[n].input_ids), after

    batches: list[list[int]] = []
    longest = [0, 0]
    for number in sorted(numbers, key=lambda n: (sum(size(n)), size(n), n)):
        wider = [max(old, new) for old, new in zip(longest, size(number))]
        if batches and (len(batches[-1]) + 1) * sum(wider) <= most:
            batches[-1].append(number)
            longest = wider
        else:
            batches.append([number])
            longest = list(size(number))
    return tuple(tuple(batch) for batch in batches)


def _describe(pair: ModelPair, teacher: ModelPair | None) -> dict[str, Any]:
    roles = {"drafter": pair.drafter, "verifier": pair.verifier}
    described = {role: pair.fingerprints.get(role) or fingerprint(model) for role, model in roles.items()}
    if teacher is not None:
        described["teacher"] = teacher.fingerprints.get("verifier") or fingerprint(teacher.verifier)
    return {
        **described,
        "tokenizer": pair.fingerprints.get("tokenizer"),
        "vocab_size": pair.vocab_size,
        "is_encoder_decoder": pair.is_encoder_decoder,
        "dtype": {role: str(model.dtype).removeprefix("torch.") for role, model in roles.items()},
    }


def fingerprint(model: Any) -> dict[str, str]:
    """Fingerprint of a model handed over in memory: its kind and samples of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.tobytes())
    kind = {"model_type": model.config.model_type}
    return {"config": provenance.hash_of(kind), "weights": digest.hexdigest()[:16]}


def prompts_hash(prompts: Sequence[EncodedPrompt], on_policy: bool) -> str:
    """Hash of ids and encoded texts, references only where they are the prefixes."""
    digest = hashlib.sha256()
    for prompt in prompts:
        reference = [] if on_policy else prompt.reference_ids
        digest.update(repr((prompt.id, prompt.input_ids, reference)).encode())
    return digest.hexdigest()


def announcement(plan: CollectionPlan, out: str, done: set[int], seconds_per_token: float | None) -> str:
    """One line that announces a run: prompts left, tokens, time and bytes."""
    todo = [chunk.id for chunk in plan.manifest.chunks if chunk.id not in done]
    tokens = sum(plan.rows[chunk] for chunk in todo)
    size = sum(plan.chunk_bytes(chunk) for chunk in todo)
    most = "" if plan.manifest.prefixes == "reference" else "at most "
    time = "" if seconds_per_token is None else f", {most}about {duration(tokens * seconds_per_token)}"
    resumed = f" ({len(done)} of {len(plan.rows)} shards are there already)" if done else ""
    return (
        f"collect: {most}{tokens:,} tokens of {len(plan.prompts):,} prompts in {len(todo)} shards{time}, "
        f"{most}{size_text(size)} to {out}{resumed}"
    )


def duration(seconds: float) -> str:
    """``7 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_text(size: int) -> str:
    """Bytes in words: ``480 kB``, ``12.3 MB``, ``1.2 GB``."""
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def refuse_small_disk(out: str, size: int) -> None:
    """Refuse a folder whose disk cannot take what is about to be written.

    Raises:
        InputError: says how much is needed and how much is free.
    """
    free = open_folder(out).free_bytes()
    if free is not None and size > free:
        raise InputError(
            f"out={out}: about {size_text(size)} are needed, {size_text(free)} are free; "
            "use max_bytes, a smaller log_top_k, or another disk"
        )
