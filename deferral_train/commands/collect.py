"""`deferral-train collect`: run both models over prompts and log their token distributions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deferral_train.collecting.config import ON_POLICY_TOKENS, CollectConfig
from deferral_train.decoding.settings import ENGINES, VLLM
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
        engine: transformers; or vllm: logs what a cascade emits in the serving engine, or with labels sequence has it
            finish the texts (docs/serving_vllm.md).
        progress: announce the work and show a progress bar.
        fresh: remove the traces that lie in ``out`` and start over.
    """
    from deferral_train.collecting import collect
    from deferral_train.collecting.api import tell_plan

    if engine not in ENGINES:
        raise InputError(f"engine={engine!r}: use {' or '.join(ENGINES)}")
    if plan and config.labels != SEQUENCE_LABELS:
        raise InputError(
            f"plan: it tells the cost of labels 'sequence', not of {config.labels!r}; leave it out"
        )
    if engine == VLLM and config.labels is None:
        return _collect_in_engine(config, out, fresh)
    given: dict[str, Any] = {}
    if config.labels == "autojudge":
        given["scores"] = {config.metrics[0]: _quality(config.metrics[0])}
    if config.labels == SEQUENCE_LABELS:
        from deferral_train.evaluation.scorers import make_scorers

        given["scores"] = make_scorers(config.metrics)
    with ExitStack() as stack:
        if engine == VLLM:
            given |= stack.enter_context(_writing(config))
        if plan:
            tell_plan(config, **given)
        else:
            collect(config, out, progress, existing="fresh" if fresh else "resume", **given)
    return 0


@contextmanager
def _writing(config: CollectConfig) -> Iterator[dict[str, Any]]:
    """Arguments of `collect` for texts that vLLM finishes: the prompts as read, and the engine."""
    from deferral_train.collecting.plan import read_any_prompts
    from deferral_train.collecting.served import check_served
    from deferral_train.serving.running import EngineSettings
    from deferral_train.serving.writing import WritingEngine, context_of

    check_served(config)
    prompts = read_any_prompts(config)
    most = config.new_tokens or ON_POLICY_TOKENS
    settings = EngineSettings(
        config.verifier, device=config.device, dtype=config.dtype, seed=config.seed,
        context=context_of(config.verifier, prompts, config.chat, config.max_prompt_tokens, most),
    )  # fmt: skip
    with WritingEngine(settings, sampled=config.temperature > 0) as engine:
        yield {"prompts": prompts, "engine": engine}


def _collect_in_engine(config: CollectConfig, out: str, fresh: bool) -> int:
    """Log what a cascade emits in vLLM."""
    from deferral_train.collecting.plan import read_any_prompts
    from deferral_train.provenance import one_writer
    from deferral_train.serving.offline import collect_with_engine
    from deferral_train.traces.folder import open_folder
    from deferral_train.traces.writer import clear_folder

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
