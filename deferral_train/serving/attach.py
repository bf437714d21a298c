"""Attach the plug-in to a vLLM worker.

Everything is done on instances, nothing on vLLM's classes, so that a second engine in the process is not touched.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any

from deferral_train.rules import Rule
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import VARIABLE, Counters
from deferral_train.serving.seam import MakeSampler, Seam, log


def attach(
    worker: Any,
    vllm_config: Any,
    config: ServingConfig,
    rule: Rule,
    mismatch: list[str],
    conditions: Sequence[str] = (),
) -> Seam:
    """Put the plug-in into a worker whose device is ready and whose weights are not loaded yet.

    Args:
        mismatch: why the rule's head is not for this pair: then every request is served lossless.
        conditions: what differs from what the head was certified on: served, said, counted.

    Raises:
        InputError: a runner that has not the parts we replace.
    """
    first = getattr(worker, "rank", 0) % max(1, vllm_config.parallel_config.tensor_parallel_size) == 0
    label = str(vllm_config.parallel_config.data_parallel_index)
    counters = Counters(os.environ.get(VARIABLE) if first else None, label)
    logger = _trace_log(vllm_config, config, counters, label) if config.log is not None and first else None
    kind, make_sampler = _parts(vllm_config.use_v2_model_runner)
    seed = vllm_config.model_config.seed or 0
    seam: Seam = kind(
        worker.model_runner, config, rule, mismatch, counters, logger, seed, label if first else None
    )
    seam.requests.conditions = list(conditions)
    seam.install(vllm_config.speculative_config, make_sampler)
    _follow_scheduler(worker.model_runner, seam)
    _close_with(worker, seam)
    announce(config, rule, mismatch, conditions)
    return seam


def _parts(second: bool) -> tuple[type[Seam], MakeSampler]:
    """Seam and sampler of the V1, or the ``second``, model runner; imported here, since vLLM must be running."""
    if second:
        from deferral_train.serving.runner_v2 import SeamV2
        from deferral_train.serving.sampler_v2 import make_sampler as make_second

        return SeamV2, make_second
    from deferral_train.serving.runner_v1 import SeamV1
    from deferral_train.serving.sampler_v1 import make_sampler as make_first

    return SeamV1, make_first


def _trace_log(vllm_config: Any, config: ServingConfig, counters: Counters, label: str) -> Any:
    from deferral_train.serving.checks import describe_pair
    from deferral_train.serving.trace_log import TraceLog

    assert config.log is not None
    widths = None
    if config.log.hidden:
        models = {
            "drafter": vllm_config.speculative_config.draft_model_config,
            "verifier": vllm_config.model_config,
        }
        widths = {role: model.get_hidden_size() for role, model in models.items()}
    return TraceLog(config, describe_pair(vllm_config), counters, label, widths)


def _follow_scheduler(runner: Any, seam: Seam) -> None:
    """Tell the seam of every step before it runs, but not of the engine's dummy ones."""
    execute_model = runner.execute_model

    def followed(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # (intermediate_tensors, dummy_run, ..); the V1 runner has the first alone.
        if not kwargs.get("dummy_run", args[1] if len(args) > 1 else False):
            seam.schedule(scheduler_output)
        return execute_model(scheduler_output, *args, **kwargs)

    runner.execute_model = followed


def announce(config: ServingConfig, rule: Rule, mismatch: list[str], conditions: Sequence[str] = ()) -> None:
    """Log once the rule and settings in force."""
    if config.mode == "shadow":
        log.warning("deferral: shadow mode; served lossless, counting what %s would do", config.spec)
    elif rule.is_lossless:
        log.warning('deferral: %s, "lossy": false', config.spec)
    else:
        log.warning(
            'deferral: %s, "lossy": true: outputs differ from the verifier\'s; a request may say deferral_lossless',
            config.spec,
        )
    if conditions and not mismatch:
        log.warning("deferral: served, but the certificate does not speak of it: %s", "; ".join(conditions))
    if mismatch:
        log.warning(
            "deferral: every request is served lossless: the head is for another pair: %s",
            "; ".join(mismatch),
        )


def _close_with(worker: Any, seam: Seam) -> None:
    shutdown = worker.shutdown

    def shutdown_both(*args: Any, **kwargs: Any) -> Any:
        try:
            return shutdown(*args, **kwargs)
        finally:
            atexit.unregister(seam.close)  # which would hold the models in memory until the process ends
            seam.close()

    worker.shutdown = shutdown_both
    atexit.register(seam.close)
