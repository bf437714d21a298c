"""Logged blocks as columns of traces. N rows of one block, K candidates, V vocabulary, D hidden width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral_train.rules import summarize
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS

LOGGED = (*SUMMARY_COLUMNS, *TOKEN_COLUMNS)


@dataclass
class BlockRows:
    """What is kept of one block: the drafted positions that emitted a token.

    Attributes:
        drafter, verifier: logits [N, V]. token, position, draft_position, origin: [N].
        hidden: states [N, D] by role.
    """

    drafter: Tensor
    verifier: Tensor
    token: Tensor
    position: Tensor
    draft_position: Tensor
    origin: Tensor
    hidden: dict[str, Tensor]


def columns_of(
    blocks: Sequence[BlockRows], vocabulary: int, temperature: float, top_k: int, hidden: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """Columns of every block, computed for all together.

    Args:
        vocabulary: columns of logits from there on are padding.
        temperature: of the column ``tv``. top_k: K, 0 for no candidates. hidden: roles whose states are logged.

    Raises:
        InputError: logits that are not finite.
    """

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(block, name) for block in blocks])

    drafter, verifier = (joined(role)[:, :vocabulary].float() for role in ("drafter", "verifier"))
    token = joined("token")
    summary = summarize(drafter, verifier, temperature=temperature, token=token, fields=LOGGED)
    columns = {name: summary[name].numpy() for name in summary.names}
    columns |= {name: joined(name).numpy() for name in ("position", "draft_position", "origin")}
    columns["gold"] = np.full(len(token), -1)
    if top_k:
        columns |= _candidates(drafter, verifier, top_k)
    most = torch.finfo(torch.float16).max
    for role in hidden:
        states = torch.cat([block.hidden[role] for block in blocks])
        columns[f"{role}_hidden"] = states.float().clamp(-most, most).half().numpy()
    ends = np.cumsum([len(block.token) for block in blocks])[:-1]
    parts = {name: np.split(column, ends) for name, column in columns.items()}
    return [{name: column[place] for name, column in parts.items()} for place in range(len(blocks))]


def _candidates(drafter: Tensor, verifier: Tensor, top_k: int) -> dict[str, np.ndarray]:
    """Each model's K likeliest tokens, likeliest first, what both models give them, and what is left."""
    logprobs = {"drafter": drafter.log_softmax(-1), "verifier": verifier.log_softmax(-1)}
    columns: dict[str, np.ndarray] = {}
    for role, own in logprobs.items():
        top = own.topk(top_k, dim=-1)
        columns[f"{role}_top_ids"] = top.indices.int().numpy()
        columns[f"{role}_tail"] = (1 - top.values.exp().sum(-1)).clamp(0, 1).numpy()
        for other, theirs in logprobs.items():
            columns[f"{role}_top_{other}_logprobs"] = theirs.gather(-1, top.indices).half().numpy()
    return columns
