"""Attach the plug-in to a vLLM worker: one sampler is replaced, four methods of runner and drafter are wrapped.

Everything is done on instances, nothing on vLLM's classes, so that a second engine in the process is not touched.
B requests of a batch, V vocabulary.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Rule
from deferral_train.rules.sampling import draw
from deferral_train.serving.blocks import GREEDY_BELOW
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import VARIABLE, Counters
from deferral_train.serving.seam import Seam, log


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
    from deferral_train.serving.sampler import DeferralSampler

    runner = worker.model_runner
    wanted = ("rejection_sampler", "drafter", "sample_tokens", "_sample", "propose_draft_token_ids")
    missing = [name for name in wanted if not hasattr(runner, name)]
    if missing:
        raise InputError(
            f"deferral: this engine's {type(runner).__name__} has no {', '.join(missing)}; "
            "start with VLLM_USE_V2_MODEL_RUNNER=0, or use a tested version of vLLM"
        )
    first = getattr(worker, "rank", 0) % max(1, vllm_config.parallel_config.tensor_parallel_size) == 0
    label = str(vllm_config.parallel_config.data_parallel_index)
    counters = Counters(os.environ.get(VARIABLE) if first else None, label)
    logger = None
    if config.log is not None and first:
        from deferral_train.serving.checks import describe_pair
        from deferral_train.serving.trace_log import TraceLog

        widths = None
        if config.log.hidden:
            models = {
                "drafter": vllm_config.speculative_config.draft_model_config,
                "verifier": vllm_config.model_config,
            }
            widths = {role: model.get_hidden_size() for role, model in models.items()}
        logger = TraceLog(config, describe_pair(vllm_config), counters, label, widths)
    seed = vllm_config.model_config.seed or 0
    seam = Seam(runner, config, rule, mismatch, counters, logger, seed, label if first else None)
    seam.requests.conditions = list(conditions)
    seam.sampler = DeferralSampler(runner.sampler, vllm_config.speculative_config, runner.device, seam)
    runner.rejection_sampler = seam.sampler
    _wrap_runner(runner, seam)
    if hasattr(runner.drafter, "_sample_draft_tokens"):
        runner.drafter._sample_draft_tokens = _kept_draft(runner.drafter, seam)
    _close_with(worker, seam)
    announce(config, rule, mismatch, conditions)
    return seam


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


def _wrap_runner(runner: Any, seam: Seam) -> None:
    sample_tokens, sample, propose = runner.sample_tokens, runner._sample, runner.propose_draft_token_ids

    def noted_sample_tokens(*args: Any, **kwargs: Any) -> Any:
        if runner.execute_model_state is not None:
            seam.note(runner.execute_model_state)
        return sample_tokens(*args, **kwargs)

    def forgetful_sample(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        seam.proposals.begin(False)  # they were for this step; a step without drafting must not find them
        return output

    def kept_propose(*args: Any, **kwargs: Any) -> Any:
        seam.proposals.begin(seam.wants_distributions())
        drafted = propose(*args, **kwargs)
        seam.proposals.finish(runner.input_batch.req_ids)
        return drafted

    runner.sample_tokens = noted_sample_tokens
    runner._sample = forgetful_sample
    runner.propose_draft_token_ids = kept_propose


def _kept_draft(drafter: Any, seam: Seam) -> Any:
    original = drafter._sample_draft_tokens

    def sample_draft_tokens(hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        if not seam.proposals.open:
            return original(hidden_states, sampling_metadata)
        logits = drafter.model.compute_logits(hidden_states)
        seam.proposals.add(logits, hidden_states)
        if sampling_metadata.all_greedy or not drafter._enable_probabilistic_draft_probs:
            return logits.argmax(dim=-1), None
        tokens, distribution = drafter._sample_from_logits(
            logits.clone(), sampling_metadata
        )  # which scales them in place
        if distribution is not None:
            _seeded_drafts(tokens, distribution, sampling_metadata)
        return tokens, distribution

    return sample_draft_tokens


def _seeded_drafts(tokens: Tensor, distribution: Tensor, sampling_metadata: Any) -> None:
    """Draw again the drafts [B] of sampled requests with a seed, from their own streams: the engine seeds none."""
    for row, stream in sampling_metadata.generators.items():
        if row < len(tokens) and float(sampling_metadata.temperature[row]) >= GREEDY_BELOW:
            number = torch.rand(1, dtype=torch.float64, device=stream.device, generator=stream)
            tokens[row] = draw(distribution[row : row + 1], number.to(distribution.device))[0]


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
