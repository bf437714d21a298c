"""Replacement of vLLM's rejection sampler: verdicts by rules; bonus tokens and log probabilities stay vLLM's.

Imported only inside a running engine. R rows with drafts, T drafted positions, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler

from deferral_train.serving.blocks import GREEDY_BELOW

if TYPE_CHECKING:
    from deferral_train.serving.runner_v1 import SeamV1


class DeferralSampler(RejectionSampler):
    """vLLM's `RejectionSampler` with the accept and residual steps replaced.

    Steps in which no row has a rule, is logged or shadowed go to the engine's own code, unless they sample on a CPU,
    where that code is broken (docs/upstream.md).
    """

    def __init__(self, sampler: Any, spec_config: Any, device: torch.device, seam: SeamV1) -> None:
        super().__init__(sampler, spec_config, device)
        self.seam = seam

    def forward(
        self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any
    ) -> SamplerOutput:
        """As `RejectionSampler.forward`: sampled ids [B, T+1], -1 after the last one of a row."""
        if metadata.max_spec_len == 0:  # the engine's top-k on a CPU fails on a step without a single draft
            return self.sampler(
                logits=logits[metadata.bonus_logits_indices],
                sampling_metadata=sampling_metadata,
                predict_bonus_token=True,
            )
        began = time.perf_counter()
        if self.seam.only_logs(metadata, sampling_metadata):
            output = super().forward(metadata, draft_probs, logits, sampling_metadata)
            began = time.perf_counter()
            self.seam.log_engine_step(metadata, logits, output.sampled_token_ids)
            self.seam.counters.add("verdict_seconds", time.perf_counter() - began)
            return output
        step = self.seam.begin_step(metadata, sampling_metadata)
        if step is None:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        self.seam.counters.add("verdict_seconds", time.perf_counter() - began)
        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )
        raw = logits[metadata.target_logits_indices].to(torch.float32)
        # The processors write in place; log probabilities and traces want the logits as they were.
        kept = sampling_metadata.max_num_logprobs is not None or self.seam.logger is not None
        processed = self.apply_logits_processors(raw.clone() if kept else raw, sampling_metadata, metadata)
        sampling = self._truncated(processed, metadata, sampling_metadata)
        outcome = self.seam.decide(step, raw, processed, sampling, metadata.target_logits_indices)
        began = time.perf_counter()
        tokens = self._tokens(step, outcome, bonus.sampled_token_ids, metadata)
        self.seam.counters.add("verdict_seconds", time.perf_counter() - began)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            target = raw
            if self.is_processed_logprobs_mode:
                target = processed if sampling is None else sampling
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs, metadata, logits, target,
                bonus.logprobs_tensors.logprobs, tokens,
            )  # fmt: skip
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def _truncated(self, logits: Tensor, metadata: Any, sampling_metadata: Any) -> Tensor | None:
        """Logits after temperature and truncation [N, V]; None where no row truncates."""
        if sampling_metadata.all_greedy or (
            sampling_metadata.top_k is None
            and sampling_metadata.top_p is None
            and not self.is_processed_logprobs_mode
        ):
            return None
        counts = torch.tensor(metadata.num_draft_tokens, device=logits.device)

        def expand(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat_interleave(counts)

        temperature = expand(sampling_metadata.temperature)
        assert temperature is not None
        temperature = torch.where(temperature < GREEDY_BELOW, 1.0, temperature)
        scaled = logits / temperature.unsqueeze(-1)
        top_k, top_p = expand(sampling_metadata.top_k), expand(sampling_metadata.top_p)
        return apply_top_k_top_p(scaled, top_k, top_p)

    @staticmethod
    def _tokens(step: Any, outcome: Any, bonus: Tensor, metadata: Any) -> Tensor:
        """Sampled ids [B, max_spec_len + 1] int32."""
        width = metadata.max_spec_len + 1
        tokens = np.full((len(metadata.num_draft_tokens), width), PLACEHOLDER_TOKEN_ID, dtype=np.int32)
        tokens[:, 0] = own = bonus[:, 0].cpu().numpy()  # rows without drafts: the engine's own token
        accepted, correction = outcome.accepted.numpy(), outcome.correction.numpy()
        last = np.where(correction < 0, own[step.members], correction)
        drafts = step.drafted.shape[1]
        rows = np.full((len(step.members), width), PLACEHOLDER_TOKEN_ID, dtype=np.int32)
        np.copyto(
            rows[:, :drafts], step.drafted, where=np.arange(drafts) < accepted[:, None], casting="same_kind"
        )
        rows[np.arange(len(rows)), accepted] = last
        tokens[step.members] = rows
        return torch.from_numpy(tokens).to(bonus.device)


def make_sampler(runner: Any, spec_config: Any, seam: SeamV1) -> DeferralSampler:
    """The sampler that takes the place of the V1 runner's own."""
    return DeferralSampler(runner.sampler, spec_config, runner.device, seam)
