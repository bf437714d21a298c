"""Rejection sampler of vLLM's V2 runner with the verdicts of rules; log probabilities and masks stay vLLM's.

Imported only inside a running engine. N rows of logits of a step, V vocabulary.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from deferral_train.errors import InputError
from deferral_train.serving.runner_v2 import EngineRows

if TYPE_CHECKING:
    from deferral_train.serving.runner_v2 import SeamV2

VERIFY = inspect.signature(RejectionSampler._verify)
ARGUMENTS = ("logits", "draft_logits", "pos", "idx_mapping_np", "verify_draft_sampled")


def check_sampler(runner: Any) -> None:
    """Refuse a runner whose sampler is not the one that we know how to replace.

    Raises:
        InputError: naming what is there.
    """
    found = type(runner.rejection_sampler)
    if found is not RejectionSampler:
        raise InputError(
            f"deferral: this model has a rejection sampler of its own ({found.__name__}), whose verdicts no rule can "
            "replace; leave additional_config['deferral'] out"
        )
    missing = [name for name in ARGUMENTS if name not in VERIFY.parameters]
    if missing:
        raise InputError(
            f"deferral: RejectionSampler._verify of this vLLM has no {', '.join(missing)}; use a tested version"
        )
    for part, name in (
        ("batch_sharder", "batch-sharded sampling"),
        ("adaptive_verification", "adaptive verification"),
    ):
        if getattr(runner, part, None) is not None:
            raise InputError(f"deferral: {name} was switched on by the engine; switch it off")


class DecisionLogits(LogitsProcessor):
    """Keeps the logits before temperature, which decisions read; changes none. It must be the last processor."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.wanted = False
        self.kept: Tensor | None = None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """False: no request needs its logits processed for our sake."""
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Keep a copy [N, V]: the temperature is applied in place."""
        if self.wanted:
            self.kept = logits.clone()
            # Which the engine does after all processors.
            self.sampler.thinking_budget_state.apply(self.kept, ctx)
        return logits


class DeferralSamplerV2(RejectionSampler):
    """vLLM's `RejectionSampler` of the V2 runner; rows whose request has a rule are verified by that."""

    def __init__(self, sampler: Any, spec_config: Any, device: torch.device, seam: SeamV2) -> None:
        super().__init__(sampler, spec_config, device)
        self.seam = seam
        self.decision = DecisionLogits(sampler)
        sampler.logits_processors.append(self.decision)

    def __call__(self, logits: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """As `RejectionSampler.__call__`."""
        self.seam.begin(input_batch)
        return super().__call__(logits, input_batch, *args, **kwargs)

    def _verify(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = SimpleNamespace(**VERIFY.bind(self, *args, **kwargs).arguments)
        members = self.seam.members(given.idx_mapping_np)
        self.decision.wanted = members is not None
        processed, tokens, count = super()._verify(*args, **kwargs)
        kept, self.decision.kept, self.decision.wanted = self.decision.kept, None, False
        if members is not None:
            decision = given.logits if kept is None else kept
            engine = EngineRows(
                given.logits, decision, processed, given.verify_draft_sampled, given.draft_logits, given.pos,
                given.idx_mapping_np, tokens, count,
            )  # fmt: skip
            self.seam.decide(members, engine)
        return processed, tokens, count


def make_sampler(runner: Any, spec_config: Any, seam: SeamV2) -> DeferralSamplerV2:
    """The sampler that takes the place of the V2 runner's own.

    Raises:
        InputError: that is not the one that we know how to replace.
    """
    check_sampler(runner)
    return DeferralSamplerV2(runner.sampler, spec_config, runner.device, seam)
