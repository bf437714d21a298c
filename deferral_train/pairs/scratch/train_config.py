"""Everything that decides how a trained pair comes out. Light to import: no torch, no transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deferral_train import provenance
from deferral_train.errors import InputError

FINAL_RATE = 0.1  # of the peak, where nothing else is asked for
EPS = 1e-8  # AdamW's own


@dataclass(frozen=True)
class ModelSize:
    """Shape of one model.

    Attributes:
        layers: decoder layers; of a T5 model also its encoder layers.
        width: hidden width, a multiple of ``heads``.
        heads: attention heads.
        feed_forward: inner width of the (gated) feed-forward layers.
        copies: a decoder's first two layers start with a circuit that copies, found in most of a short training
            otherwise (:mod:`deferral_train.pairs.scratch.copying`); its attention has biases.
    """

    layers: int
    width: int
    heads: int
    feed_forward: int
    copies: bool = False

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.feed_forward) < 1 or self.width % (2 * self.heads):
            raise InputError(f"{self}: sizes must be positive and width a multiple of 2 * heads")
        if self.copies and (self.heads != 2 or self.layers < 2):
            raise InputError(
                f"copies: needs heads=2 and at least 2 layers, got heads={self.heads}, layers={self.layers}; set them, "
                "or leave copies out"
            )


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one model is trained.

    Attributes:
        steps: optimiser steps.
        batch: sequences a step (text windows of ``context`` tokens, or sentence pairs).
        learning_rate: peak rate of AdamW for everything but the embeddings; linear warm-up, then a cosine.
        muon_rate: peak rate of Muon (about 0.02), which then takes the layers' matrices from AdamW: dearer steps of
            which fewer are needed; 0 leaves them to AdamW.
        final_rate: of the peak rates, reached at the last step.
        embedding_rate: the embeddings' rate as a multiple of it.
        embedding_eps: of AdamW for the embeddings. Every row has a small gradient in every batch, and AdamW makes steps
            of equal length of small gradients and large ones, which moves the rows of rare tokens all one way; an eps
            above those gradients (about 1e-4) leaves them where they are.
        warmup: steps of warm-up.
        weight_decay: on matrices, not on norms and embeddings.
        shallow_layers, shallow_steps: for so many steps only the first so many layers run and learn. A layer adds
            nothing when it is new, so that the others join without a jump, and a deep model learns what a shallow one
            can at the price of a shallow one. 0 runs all layers from the beginning.
        distil: weight of KL(verifier, drafter) against the text's cross entropy; the drafter's alone.
        alignable_top_k: weigh that divergence by how many drafts of ``draft_window`` tokens reach a position,
            a draft ending behind a true token that is not among the drafter's so many likeliest (GRIFFIN's
            mask, 3 there); 0 counts every position once.
        draft_window: tokens of such a draft.
    """

    steps: int
    batch: int
    learning_rate: float = 1.5e-3
    embedding_rate: float = 10.0
    warmup: int = 50
    weight_decay: float = 0.05
    distil: float = 0.0
    alignable_top_k: int = 0
    draft_window: int = 5
    muon_rate: float = 0.0
    final_rate: float = FINAL_RATE
    shallow_layers: int = 0
    shallow_steps: int = 0
    embedding_eps: float = EPS

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.warmup < 0:
            raise InputError(f"{self}: steps and batch must be at least 1, warmup not negative")
        if not self.embedding_eps > 0:
            raise InputError(f"embedding_eps={self.embedding_eps}: must be positive, such as {EPS}")
        if not self.learning_rate > 0 or not self.embedding_rate > 0 or not 0 <= self.distil <= 1:
            raise InputError(f"{self}: rates must be positive and distil in [0, 1]")
        if self.muon_rate < 0 or not 0 <= self.final_rate <= 1:
            raise InputError(
                f"muon_rate={self.muon_rate}, final_rate={self.final_rate}: use 0 or more, and a share of the peak in "
                "[0, 1]"
            )
        if min(self.shallow_layers, self.shallow_steps) < 0 or (self.shallow_layers > 0) != (
            self.shallow_steps > 0
        ):
            raise InputError(
                f"shallow_layers={self.shallow_layers}, shallow_steps={self.shallow_steps}: set both above 0, "
                "or neither"
            )
        if self.shallow_steps >= self.steps:
            raise InputError(
                f"shallow_steps={self.shallow_steps} of steps={self.steps} leave none for the other layers; lower it"
            )
        if self.alignable_top_k < 0 or self.draft_window < 1:
            raise InputError(
                f"alignable_top_k={self.alignable_top_k}, draft_window={self.draft_window}: use 0 (no mask) or "
                "more, and at least 1"
            )
        if self.alignable_top_k and not self.distil:
            raise InputError(
                f"alignable_top_k={self.alignable_top_k} masks the distillation, and distil is 0; set distil above "
                "0 or leave alignable_top_k out"
            )


@dataclass(frozen=True)
class PairText:
    """The text a pair learns from. Plain text files are cut into blocks of lines, table rows are texts.

    Attributes:
        files: text, jsonl, csv or parquet files (``.gz`` too), or the word ``stdlib`` alone for the
            running Python's own library sources.
        targets: the other side of parallel text, file for file; needed for T5.
        heldout: files for the quality gate, default a fixed 3% of the texts (``stdlib``: its validation
            part).
        heldout_targets: the other side of ``heldout``.
        start, limit: rows (lines of parallel text) of each file to pass over, and most to take.
        answers: rows of tables are questions with answers: a llama pair learns to follow each prompt with its
            reference and to end there; the prompt itself is not learned. The tokenizer gets a chat template, so
            that a reference counts as an answer with an end wherever the pair is used.
    """

    files: tuple[str, ...] = ("stdlib",)
    targets: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    heldout_targets: tuple[str, ...] = ()
    start: int = 0
    limit: int | None = None
    answers: bool = False

    def __post_init__(self) -> None:
        if not self.files:
            raise InputError("text.files is empty; name text files, or stdlib")
        for name, targets, files in (
            ("targets", self.targets, self.files),
            ("heldout_targets", self.heldout_targets, self.heldout if self.targets else ()),
        ):
            if targets and len(targets) != len(files):
                raise InputError(f"text.{name} has {len(targets)} files for {len(files)}; give one for each")


@dataclass(frozen=True)
class PairConfig:
    """A drafter, a verifier and their tokenizer, trained from scratch.

    Attributes:
        kind: ``llama`` (decoder-only, any text) or ``t5`` (encoder-decoder, parallel text).
        text: what to learn from.
        vocab_size: byte-level BPE pieces, special tokens included.
        context: most tokens of a training sequence (T5: of either side; longer pairs are cut).
        drafter, verifier: shapes.
        drafter_schedule, verifier_schedule: training.
        seed: of weights and batch order.
        threads: CPU threads of the training, 0 leaves torch's setting.
        autocast: bfloat16 matrix products; about 1.4x faster where the CPU has them, very slow where it
            has not.
        checkpoint_seconds: an interrupted training continues from at most this long before.
        from_verifier: checkpoint of a decoder-only model that is there already: a folder, a hub id or a ``.gguf`` file,
            which is dequantised. It becomes the pair's verifier as it is, with its tokenizer, and the drafter starts
            from ``kept_layers`` of it and is distilled; sizes, ``vocab_size`` and ``verifier_schedule`` are then not
            read. None trains both from scratch.
        kept_layers: numbers of the verifier's layers that the drafter keeps, from 0, negative ones from the end.
    """

    kind: Literal["llama", "t5"] = "llama"
    text: PairText = field(default_factory=PairText)
    vocab_size: int = 2048
    context: int = 128
    drafter: ModelSize = field(default_factory=lambda: ModelSize(1, 64, 2, 192))
    verifier: ModelSize = field(default_factory=lambda: ModelSize(8, 144, 4, 384))
    drafter_schedule: Schedule = field(default_factory=lambda: Schedule(1200, 5, 3e-3))
    verifier_schedule: Schedule = field(default_factory=lambda: Schedule(1200, 5, 7e-4, embedding_rate=20.0))
    seed: int = 0
    threads: int = 0
    autocast: bool = False
    checkpoint_seconds: float = 20.0
    from_verifier: str | None = None
    kept_layers: tuple[int, ...] = (0, 1, 2, 3, -2, -1)

    def __post_init__(self) -> None:
        if self.from_verifier is not None:
            self._check_cut()
        if self.vocab_size < 300:
            raise InputError(
                f"vocab_size={self.vocab_size}: at least 300 (256 bytes, special tokens, some merges)"
            )
        if self.context < 8:
            raise InputError(f"context={self.context}: at least 8 tokens")
        if self.kind == "t5" and not self.text.targets:
            raise InputError(
                "text.targets is empty; a t5 pair learns from parallel text, name the other side"
            )
        if self.kind == "llama" and self.text.targets:
            raise InputError(
                "text.targets is set; a llama pair learns from plain text, leave it out or use kind: t5"
            )
        if self.text.answers and self.kind == "t5":
            raise InputError(
                "text.answers is for kind: llama; a t5 pair names the other side in text.targets"
            )
        for role, size, schedule in (
            ("drafter", self.drafter, self.drafter_schedule),
            ("verifier", self.verifier, self.verifier_schedule),
        ):
            if size.copies and self.kind == "t5":
                raise InputError(f"{role}.copies is for kind: llama; leave it out")
            if schedule.shallow_layers and schedule.shallow_layers >= size.layers:
                raise InputError(
                    f"{role}_schedule.shallow_layers={schedule.shallow_layers}: the {role} has {size.layers} layers; "
                    "use fewer, or 0"
                )
        if self.verifier_schedule.distil:
            raise InputError("verifier_schedule.distil: the verifier learns from text alone; set it to 0")

    def _check_cut(self) -> None:
        if self.kind != "llama":
            raise InputError("from_verifier is for decoder-only models; leave kind at llama")
        if not self.drafter_schedule.distil:
            raise InputError(
                "from_verifier: the drafter learns from the verifier's distribution; give drafter_schedule.distil "
                "above 0, such as 1"
            )

    def outcome_hash(self) -> str:
        """Hash of what changes the trained weights; how often to checkpoint does not."""
        values: dict[str, Any] = asdict(self)
        del values["checkpoint_seconds"]
        if not values["text"]["answers"]:  # pairs from before there were answers keep their hash
            del values["text"]["answers"]
        if self.from_verifier is None:  # and those from before a verifier could be given
            del values["from_verifier"], values["kept_layers"]
        for role in ("drafter", "verifier"):
            if not values[role]["copies"]:
                del values[role]["copies"]
            schedule = values[f"{role}_schedule"]  # pairs from before there was one of these keep their hash
            if not schedule["alignable_top_k"]:
                del schedule["alignable_top_k"], schedule["draft_window"]
            if schedule["embedding_eps"] == EPS:
                del schedule["embedding_eps"]
            if not schedule["muon_rate"]:
                del schedule["muon_rate"]
            if schedule["final_rate"] == FINAL_RATE:
                del schedule["final_rate"]
            if not schedule["shallow_steps"]:
                del schedule["shallow_layers"], schedule["shallow_steps"]
        return provenance.hash_of(values)
