"""`deferral-train collect`: run both models over prompts and log their token distributions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deferral_train.collecting.config import CollectConfig
from deferral_train.errors import InputError
from deferral_train.traces.kinds import SEQUENCE_LABELS

if TYPE_CHECKING:
    from deferral_train.collecting.mining import Quality


@dataclass(frozen=True)
class CollectSettings(CollectConfig):
    # Models and prompts cannot be handed over on a command line, and a list there is always one.
    __doc__ = CollectConfig.__doc__

    drafter: str = field()
    verifier: str = field()
    prompts: str = field()
    label_metric: list[str] = field(default_factory=list)
    label_scales: list[float] = field(default_factory=list)


# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = CollectSettings


def run(
    config: CollectConfig,
    out: str,
    *,
    plan: bool = False,
    engine: str = "transformers",
    progress: bool = True,
    fresh: bool = False,
) -> int:
    """Collect with transformers, or in the serving engine.

    Args:
        config: see the fields above.
        out: trace folder, or an fsspec address.
        plan: for sequence labels, say how many places, tokens and hours it would take, and stop.
        engine: transformers, or vllm: what a cascade emits in the serving engine (docs/serving_vllm.md).
        progress: announce the work and show a progress bar.
        fresh: remove the traces that lie in ``out`` and start over.
    """
    from deferral_train.collecting import collect

    if engine == "vllm":
        return _collect_in_engine(config, out, fresh)
    if engine != "transformers":
        raise InputError(f"engine={engine!r}: use transformers or vllm")
    if plan and config.labels != SEQUENCE_LABELS:
        raise InputError(
            f"plan: it tells the cost of labels 'sequence', not of {config.labels!r}; leave it out"
        )
    scores: dict[str, Any] | None = None
    if config.labels == "autojudge":
        scores = {config.metrics[0]: _quality(config.metrics[0])}
    if config.labels == SEQUENCE_LABELS:
        from deferral_train.evaluation.scorers import make_scorers

        scores = make_scorers(config.metrics)
    collect(
        config,
        out,
        progress,
        scores=scores,
        plan_only=plan,
        existing="fresh" if fresh else "resume",
    )
    return 0


def _collect_in_engine(config: CollectConfig, out: str, fresh: bool) -> int:
    """Log what a cascade emits in vLLM."""
    from deferral_train.collecting.plan import read_any_prompts
    from deferral_train.provenance import one_writer
    from deferral_train.serving.offline import collect_with_engine
    from deferral_train.traces.folder import open_folder
    from deferral_train.traces.writer import clear_folder

    if config.labels is not None:
        raise InputError(f"labels={config.labels!r}: engine 'vllm' makes none; use engine transformers")
    with one_writer(out, "collect"):
        if fresh:
            clear_folder(open_folder(out))
        count = collect_with_engine(config, out, read_any_prompts(replace(config, limit=None)))
    print(f"collect: {count:,} prompts in {out}")
    return 0


def _quality(metric: str) -> Quality:
    """Score of each text against its reference."""
    from deferral_train.evaluation.quality import check_metric, per_prompt

    check_metric(metric)
    return lambda texts, references: per_prompt(metric, texts, references).tolist()
