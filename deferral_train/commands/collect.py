"""`deferral-train collect`: run both models over prompts and log their token distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deferral_train.collecting import CollectConfig
    from deferral_train.collecting.mining import Quality


def run(
    out: str,
    drafter: str,
    verifier: str,
    prompts: str,
    prefixes: str = "reference",
    rule: str | None = None,
    num_draft_tokens: int = 5,
    temperature: float = 1.0,
    log_top_k: int = 64,
    hidden: str = "none",
    teacher: str | None = None,
    labels: str | None = None,
    label_window: int = 20,
    label_metric: list[str] = [],  # noqa: B006
    label_tolerance: float = 0.0,
    label_share: float = 1.0,
    label_samples: int = 1,
    label_reference: str = "given",
    label_form: str = "position",
    label_scales: list[float] = [],  # noqa: B006
    plan: bool = False,
    chunk_prompts: int = 256,
    batch_tokens: int | None = None,
    max_new_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    max_bytes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    devices: int = 1,
    num_nodes: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    drafter_device: str | None = None,
    device_map: str | None = None,
    chat: str = "auto",
    template: str = "{prompt}",
    prompt_format: str | None = None,
    reference_path: str | None = None,
    prompt_field: str | None = None,
    reference_field: str | None = None,
    subset: str | None = None,
    split: str = "train",
    engine: str = "transformers",
    progress: bool = True,
    fresh: bool = False,
) -> int:
    """Run both models over prompts and log their token distributions as traces; run again to resume.

    Args:
        out: trace folder, or an fsspec address.
        drafter: checkpoint folder or hub id of the small model.
        verifier: checkpoint folder or hub id of the large model, same tokenizer.
        prompts: jsonl, csv, tsv, parquet or text file (.gz too), a datasets name, or an fsspec address.
        prefixes: reference (teacher-forced), drafter, verifier or cascade (on-policy).
        rule: rule of a cascade, such as opt:alpha=0.2 or learned:head=FOLDER.
        num_draft_tokens: most tokens a cascade drafts per block.
        temperature: of sampled prefixes and of the laws whose distance is logged; 0 is greedy.
        log_top_k: candidates logged of each model, with both log-probabilities; 0 logs the summary alone.
        hidden: whose last hidden states to log in 16 bit: none, drafter, verifier or both.
        teacher: third checkpoint whose law is logged as truth.
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
        plan: for sequence labels, say how many places, tokens and hours it would take, and stop.
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
        prompt_format: jsonl, csv, tsv, parquet, text, mmlu or dataset; default by suffix.
        reference_path: second file of parallel text.
        prompt_field: column of the prompt.
        reference_field: column of the reference.
        subset: configuration of a named data set.
        split: split of a data set.
        engine: transformers, or vllm: what a cascade emits in the serving engine (docs/serving_vllm.md).
        progress: announce the work and show a progress bar.
        fresh: remove the traces that lie in ``out`` and start over.
    """
    from deferral_train.collecting import CollectConfig, collect
    from deferral_train.errors import InputError

    given = dict(locals())
    settings = {name: given[name] for name in CollectConfig.__dataclass_fields__}
    config = CollectConfig(**settings)
    if engine == "vllm":
        return _collect_in_engine(config, out, fresh)
    if engine != "transformers":
        raise InputError(f"engine={engine!r}: use transformers or vllm")
    if plan and labels != "sequence":
        raise InputError(f"plan: it tells the cost of labels 'sequence', not of {labels!r}; leave it out")
    scores = None
    if labels == "sequence":
        from deferral_train.evaluation.scorers import make_scorers

        scores = make_scorers(config.metrics)
    collect(
        config,
        out,
        progress,
        quality=_quality(config.metrics[0]) if labels == "autojudge" else None,
        scores=scores,
        plan_only=plan,
        existing="fresh" if fresh else "resume",
    )
    return 0


def _collect_in_engine(config: CollectConfig, out: str, fresh: bool) -> int:
    """Log what a cascade emits in vLLM."""
    from deferral_train.collecting.plan import read_any_prompts
    from deferral_train.errors import InputError
    from deferral_train.provenance import one_writer
    from deferral_train.serving.offline import collect_with_engine
    from deferral_train.traces.folder import open_folder
    from deferral_train.traces.writer import clear_folder

    if config.labels is not None:
        raise InputError(f"labels={config.labels!r}: engine 'vllm' makes none; use engine transformers")
    with one_writer(out, "collect"):
        if fresh:
            clear_folder(open_folder(out))
        count = collect_with_engine(config, out, read_any_prompts(config)[: config.limit])
    print(f"collect: {count:,} prompts in {out}")
    return 0


def _quality(metric: str) -> Quality:
    """Score of each text against its reference."""
    from deferral_train.evaluation.quality import check_metric, per_prompt

    check_metric(metric)
    return lambda texts, references: per_prompt(metric, texts, references).tolist()
