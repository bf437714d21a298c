"""Trace logging of greedy steps in which no request has a rule: verdicts are read off the engine's own tokens.

Nothing is done for requests that are not logged. R logged rows with drafts, T drafted positions, V vocabulary, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from deferral_train.serving.blocks import DraftedRows, Outcome
from deferral_train.serving.layout import Step, places_of
from deferral_train.serving.proposals import Proposals
from deferral_train.serving.requests import Requests


class StepReader(Protocol):
    """Reads a step of the V1 runner: the half of its seam that decides nothing."""

    runner: Any
    logger: Any | None
    proposals: Proposals
    sample_hidden: Tensor | None
    requests: Requests

    def positions_of(self, at: Tensor, names: Sequence[str]) -> Tensor:
        """Tokens generated before each drafted one, [R, T]."""


def log_step(seam: StepReader, metadata: Any, logits: Tensor, tokens: Tensor) -> None:
    """Hand over the blocks of logged requests.

    Args:
        seam: of this worker.
        metadata: of the engine's rejection sampler.
        logits: the verifier's, as the engine's sampler got them.
        tokens: emitted by it, [B, max T + 1], -1 after the last of a row.
    """
    names = seam.runner.input_batch.req_ids
    members = [
        row
        for row, count in enumerate(metadata.num_draft_tokens)
        if count > 0 and seam.requests[names[row]].logged
    ]
    if not members:
        return
    counts = [metadata.num_draft_tokens[row] for row in members]
    at = torch.from_numpy(places_of(metadata.num_draft_tokens)[members, : max(counts)])
    names = [names[row] for row in members]
    drafted = metadata.draft_token_ids.cpu()[at].long().numpy()
    targets = metadata.target_logits_indices[at.to(logits.device)]
    distributions, states, have = seam.proposals.take(names, drafted.shape[1])
    raw, lengths = logits[targets].float(), np.array(counts)
    context = {} if states is None else {"drafter_hidden": states}
    if seam.sample_hidden is not None:
        context["verifier_hidden"] = seam.sample_hidden[targets]
    step = Step(
        members, names, [], drafted, lengths, counts, [0.0] * len(members), {},
        seam.positions_of(metadata.logits_indices[targets], names),
    )  # fmt: skip
    rows = DraftedRows(
        torch.from_numpy(drafted),
        torch.from_numpy(lengths),
        raw,
        step.temperatures,
        distributions,
        have,
        context=context,
    )
    assert seam.logger is not None
    said = tokens[members].cpu()
    outcome = Outcome.of_tokens(rows.lengths, drafted.shape[1], said, (said >= 0).sum(dim=1))
    seam.logger.take(step, rows, outcome, raw, range(len(members)))
