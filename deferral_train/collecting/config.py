"""Settings of a collect run, checked, and split into those that decide the bytes and those that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deferral_train.decoding.settings import BLOCKS, Settings
from deferral_train.errors import InputError
from deferral_train.redaction import redacted_text
from deferral_train.traces.kinds import JUDGE_LABELS, PREFIX_SOURCES, SEQUENCE_LABELS

HIDDEN = {"none": (), "drafter": ("drafter",), "verifier": ("verifier",), "both": ("drafter", "verifier")}
ON_POLICY_TOKENS = 128
SEQUENCE_METRICS = ("sentence_bleu", "chrf1")
LABEL_REFERENCES = ("given", "verifier")
LABEL_FORMS = ("position", "token")


@dataclass(frozen=True)
class CollectConfig:
    """Run both models over prompts and log their token distributions as traces; run again to resume.

    Models and prompts may be left empty where :func:`deferral_train.collecting.collect` is handed them.

    Attributes:
        drafter: checkpoint folder or hub id of the small model.
        verifier: checkpoint folder or hub id of the large model, same tokenizer.
        prompts: jsonl, csv, tsv, parquet or text file (.gz too), a datasets name, or an fsspec address.
        prefixes: reference (teacher-forced), drafter, verifier or cascade (on-policy).
        rule: rule of a cascade, such as opt:alpha=0.2 or learned:head=FOLDER.
        num_draft_tokens: most tokens a cascade drafts per block.
        blocks: where a cascade's blocks lie: tight, or served as serving engines lay them (docs/engine.md).
        temperature: of sampled prefixes and of the distributions whose distance is logged; 0 is greedy.
        log_top_k: candidates logged of each model, with both log-probabilities; 0 logs the summary alone.
        hidden: whose last hidden states to log in 16 bit: none, drafter, verifier or both.
        teacher: third checkpoint whose distribution is logged as truth.
        labels: judge labels of drafted tokens (docs/judges.md): selfjudge (rescored suffix) or autojudge (finished
            texts compared), with prefixes verifier and temperature 0; or sequence: what the finished text is worth
            with the drafter's token and with the verifier's (docs/which_label.md).
        label_window: tokens after a substitution that selfjudge rescores.
        label_metric: what finished texts are scored by: chrf, chrf1, sentence_bleu, gsm8k, exact_match, rougeL, ...;
            for sequence also corpus_bleu, corpus_chrf, command:PROGRAM (reads and answers lines of JSON) and
            module:function, and several together; default chrf for autojudge, sentence_bleu chrf1 for sequence.
        label_tolerance: loss of it, against the verifier's own text, that a token may cost (chrf from 0 to 1).
        label_share: share of the places of each prompt that sequence labels.
        label_samples: continuations of each side at a temperature above 0.
        label_reference: what texts are scored against: given, or verifier (its own finished text).
        label_form: at a temperature above 0: position (averages over drafts) or token (about one drafted token).
        label_scales: what each metric's gaps are divided by; default their deviations in a first look.
        chunk_prompts: prompts per shard, the unit of work and of resuming.
        batch_tokens: most padded tokens per batch; default by device and vocabulary.
        max_new_tokens: most tokens per prefix; default 128 on-policy, unlimited on references.
        max_prompt_tokens: longer prompts are left out and named; default what the models can place.
        max_bytes: stop cleanly before the shards exceed this many bytes.
        limit: use the first so many prompts only.
        seed: base seed; every shard has one of its own, derived from it.
        devices: processes per node; under torchrun or srun as many as were started.
        num_nodes: machines; under torchrun or srun those used.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, float16 or bfloat16.
        drafter_device: device of the drafter, where it is not the verifier's.
        device_map: auto spreads the verifier over several GPUs and the CPU (needs accelerate); also balanced,
            balanced_low_0, sequential.
        chat: auto (the tokenizer's chat template where it has one), on or off.
        template: text around each prompt, with {prompt} in it.
        prompt_format: jsonl, csv, tsv, parquet, text, mmlu, mbpp, spec_bench, speed_bench or dataset; default by
            suffix.
        reference_path: second file of parallel text.
        prompt_field: column of the prompt.
        reference_field: column of the reference.
        subset: configuration of a named data set.
        split: split of a data set.
    """

    drafter: str = ""
    verifier: str = ""
    prompts: str = ""
    prefixes: str = "reference"
    rule: str | None = None
    num_draft_tokens: int = Settings.num_draft_tokens
    blocks: str = Settings.blocks
    temperature: float = 1.0
    log_top_k: int = 64
    hidden: str = "none"
    teacher: str | None = None
    labels: str | None = None
    label_window: int = 20
    label_metric: str | Sequence[str] = ()
    label_tolerance: float = 0.0
    label_share: float = 1.0
    label_samples: int = 1
    label_reference: str = "given"
    label_form: str = "position"
    label_scales: Sequence[float] = ()
    chunk_prompts: int = 256
    batch_tokens: int | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_bytes: int | None = None
    limit: int | None = None
    seed: int = 0
    devices: int = 1
    num_nodes: int = 1
    device: str = "auto"
    dtype: str = "auto"
    drafter_device: str | None = None
    device_map: str | None = None
    chat: str = "auto"
    template: str = "{prompt}"
    prompt_format: str | None = None
    reference_path: str | None = None
    prompt_field: str | None = None
    reference_field: str | None = None
    subset: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if self.prefixes not in (*PREFIX_SOURCES, "cascade"):
            raise InputError(f"prefixes={self.prefixes!r}: use {', '.join(PREFIX_SOURCES)} or cascade")
        if (self.prefixes == "cascade") != (self.rule is not None):
            raise InputError(
                f"prefixes={self.prefixes!r}, rule={self.rule!r}: a cascade needs a rule, nothing else takes one"
            )
        if self.blocks not in BLOCKS:
            raise InputError(f"blocks={self.blocks!r}: use {' or '.join(BLOCKS)}")
        if self.blocks != Settings.blocks and self.prefixes != "cascade":
            raise InputError(
                f"blocks={self.blocks!r}, prefixes={self.prefixes!r}: a cascade alone has blocks; leave it out"
            )
        if self.hidden not in HIDDEN:
            raise InputError(f"hidden={self.hidden!r}: use {', '.join(HIDDEN)}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature}: use a finite number >= 0 (0 is greedy)")
        if self.device_map is not None and self.devices * self.num_nodes > 1:
            raise InputError(
                f"device_map={self.device_map!r}, devices={self.devices}, num_nodes={self.num_nodes}: "
                "a spread verifier takes every GPU; use one process"
            )
        self._check_labels()
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}={value}: must be at least {least}")

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if self.labels == SEQUENCE_LABELS:
            self._check_sequence()
            return
        if self.labels not in JUDGE_LABELS:
            raise InputError(f"labels={self.labels!r}: use {', '.join(JUDGE_LABELS)} or {SEQUENCE_LABELS}")
        if len(self.metrics) > 1:
            raise InputError(f"label_metric={list(self.metrics)}: {self.labels} compares by one metric")
        if self.prefixes != "verifier" or self.temperature != 0:
            raise InputError(
                f"labels={self.labels!r}: they judge the verifier's greedy text, not prefixes "
                f"{self.prefixes!r} at temperature {self.temperature:g}; use prefixes verifier, temperature 0"
            )
        if not 0 <= self.label_tolerance < float("inf"):
            raise InputError(f"label_tolerance={self.label_tolerance}: use a finite number >= 0")

    def _check_sequence(self) -> None:
        if not 0 < self.label_share <= 1:
            raise InputError(f"label_share={self.label_share}: use a share above 0 and up to 1")
        if self.label_reference not in LABEL_REFERENCES or self.label_form not in LABEL_FORMS:
            raise InputError(
                f"label_reference={self.label_reference!r}, label_form={self.label_form!r}: use "
                f"{' or '.join(LABEL_REFERENCES)}, and {' or '.join(LABEL_FORMS)}"
            )
        if self.temperature == 0 and (self.label_samples > 1 or self.label_form == "token"):
            raise InputError(
                f"label_samples={self.label_samples} and label_form={self.label_form!r} at temperature 0: there is one "
                "continuation and one token; use 1 and position, or a temperature above 0"
            )
        if len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"label_metric={list(self.metrics)}: name each metric once")
        scales = list(self.label_scales)
        if scales and (len(scales) != len(self.metrics) or not all(0 < one < float("inf") for one in scales)):
            raise InputError(
                f"label_scales={scales}: give one number above 0 for each of {list(self.metrics)}"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names in ``label_metric``, or the defaults of the labels."""
        given = (self.label_metric,) if isinstance(self.label_metric, str) else tuple(self.label_metric)
        default = SEQUENCE_METRICS if self.labels == SEQUENCE_LABELS else ("chrf",)
        return given or default

    @property
    def label_settings(self) -> dict[str, Any]:
        """How labels are made, as the manifest records it; empty for none."""
        if self.labels is None:
            return {}
        if self.labels == "selfjudge":
            return {"kind": self.labels, "window": self.label_window}
        if self.labels == "autojudge":
            metric = redacted_text(self.metrics[0])
            return {"kind": self.labels, "metric": metric, "tolerance": self.label_tolerance}
        own = ("share", "samples", "reference", "form")
        return {"kind": self.labels, "metrics": [redacted_text(metric) for metric in self.metrics]} | {
            name: getattr(self, f"label_{name}") for name in own
        }

    @property
    def on_policy(self) -> bool:
        return self.prefixes != "reference"

    @property
    def prefix_name(self) -> str:
        """The prefix source as the manifest records it: ``cascade:<rule>`` for cascades."""
        return f"cascade:{self.rule}" if self.prefixes == "cascade" else self.prefixes

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of a prefix."""
        return ON_POLICY_TOKENS if self.on_policy and self.max_new_tokens is None else self.max_new_tokens

    def deciding(self) -> dict[str, Any]:
        """Settings that the bytes of the shards depend on and that the manifest has no field of its own for."""
        names = ["chat", "template", "max_prompt_tokens"]
        names += ["num_draft_tokens"] if self.prefixes == "cascade" else []
        names += ["blocks"] if self.blocks != Settings.blocks else []  # younger than most folders
        return {"max_new_tokens": self.new_tokens, **{name: getattr(self, name) for name in names}}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_AT_LEAST = {
    "log_top_k": 0,
    "chunk_prompts": 1,
    "batch_tokens": 1,
    "max_new_tokens": 1,
    "max_prompt_tokens": 1,
    "max_bytes": 1,
    "limit": 1,
    "seed": 0,
    "devices": 1,
    "num_nodes": 1,
    "num_draft_tokens": 1,
    "label_window": 1,
    "label_samples": 1,
}
