"""From two models' logits to the columns of trace rows: the summary, with candidates and tails.

Everything is computed on the full vocabulary, in float32, before any truncation. N rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.rules.distributions import Distributions
from deferral_train.rules.summary import summarize_distributions
from deferral_train.rules.tails import Candidates
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS

LOGGED = (*SUMMARY_COLUMNS, *TOKEN_COLUMNS)
# Logits of one model per block: an intermediate takes 1 MiB on a CPU, in reach of its caches, and 512 MiB elsewhere.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 27


class Measure:
    """Computes the columns of rows, a block of them at a time.

    Args:
        vocab_size: V, columns that both models and the tokenizer know; further logits are padding.
        top_k: K, candidates per model (at most V); 0 logs none.
        temperature: of the sampling distributions that ``tv`` compares; 0 is greedy.
    """

    def __init__(self, vocab_size: int, top_k: int = 0, temperature: float = 1.0) -> None:
        self.vocab_size, self.temperature = vocab_size, temperature
        self.top_k = min(top_k, vocab_size)

    def __call__(self, drafter: Tensor, verifier: Tensor, rows: Tensor, token: Tensor) -> dict[str, Tensor]:
        """Columns by name of the chosen rows, on the logits' device.

        Args:
            drafter, verifier: logits [M, >=V] of any floating type.
            rows: [N] int64, which of the M rows.
            token: [N] int64, the token spoken of at each.

        Returns:
            Summary columns [N], with ``top_k`` also tails [N], ids and log-probabilities [N, K], and ``finite`` [N]
            bool: False where a logit was NaN or infinite and the row means nothing.
        """
        size = max(1, (CPU_BLOCK if drafter.device.type == "cpu" else DEVICE_BLOCK) // self.vocab_size)
        blocks = [
            self._block(drafter, verifier, some, tokens)
            for some, tokens in zip(rows.split(size), token.split(size))
        ]
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    def _block(self, drafter: Tensor, verifier: Tensor, rows: Tensor, token: Tensor) -> dict[str, Tensor]:
        logits = [part[:, : self.vocab_size].index_select(0, rows).float() for part in (drafter, verifier)]
        distributions = Distributions.of(logits[0], logits[1], self.temperature)
        summary = summarize_distributions(distributions, LOGGED, token)
        lowest, highest = distributions.decision.aminmax(dim=-1)  # NaN where a logit is
        columns = {name: summary[name] for name in summary}
        columns["finite"] = (torch.isfinite(lowest) & torch.isfinite(highest)).all(dim=0)
        return columns | (Candidates.top(distributions, self.top_k) if self.top_k else {})
