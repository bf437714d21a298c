"""Logged blocks as columns of traces. N rows of one block, K candidates, V vocabulary, D hidden width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral_train.rules.distributions import Distributions
from deferral_train.rules.summary import summarize_distributions
from deferral_train.rules.tails import Candidates
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS

LOGGED = (*SUMMARY_COLUMNS, *TOKEN_COLUMNS)


@dataclass
class BlockRows:
    """Logged tensors of one block: its drafted positions that emitted a token.

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
    distributions = Distributions.of(drafter, verifier, temperature)
    distributions.check()
    summary = summarize_distributions(distributions, LOGGED, token)
    columns = {name: summary[name].numpy() for name in summary.names}
    columns |= {name: joined(name).numpy() for name in ("position", "draft_position", "origin")}
    columns["gold"] = np.full(len(token), -1)
    if top_k:
        columns |= {name: column.numpy() for name, column in Candidates.top(distributions, top_k).items()}
    most = torch.finfo(torch.float16).max
    for role in hidden:
        states = torch.cat([block.hidden[role] for block in blocks])
        columns[f"{role}_hidden"] = states.float().clamp(-most, most).half().numpy()
    ends = np.cumsum([len(block.token) for block in blocks])[:-1]
    parts = {name: np.split(column, ends) for name, column in columns.items()}
    return [{name: column[place] for name, column in parts.items()} for place in range(len(blocks))]
