"""From two models' logits to the columns of trace rows: the fast twin of `summarize`, with candidates and tails.

Everything is computed on the full vocabulary, in float32, before any truncation. Blocks of a few rows stay in
the cache; both models share each pass, and all sums of products (entropies, cross entropies, sums of squares)
come out of two small matrix products. ``rules.summary.summarize`` is the reference that tests hold this against.

R rows of a block, V vocabulary, W padded width, K candidates. Axis 0 of the work arrays is the model: 0 drafter
q, 1 verifier p.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

NEVER = -1e30  # logit of padding columns: probability 0, and 0 * NEVER is 0 where 0 * -inf is not
GROUP = 8  # columns per group in the search for the top k
CPU_BLOCK = 1 << 16  # logits of one model per block that fit a core's cache with their work arrays
CUDA_BLOCK = 1 << 27
TINY = 1e-37  # keeps log(0) out of 0 log 0


class Measure:
    """Computes the columns of rows; keeps its work arrays between calls.

    Args:
        vocab_size: V, columns that both models and the tokenizer know; further logits are padding.
        top_k: K, candidates per model (at most V); 0 logs none.
        temperature: of the sampling laws that ``tv`` compares; 0 is greedy.
    """

    def __init__(self, vocab_size: int, top_k: int = 0, temperature: float = 1.0) -> None:
        self.vocab_size, self.temperature = vocab_size, temperature
        self.top_k = min(top_k, vocab_size)
        self.width = -(-vocab_size // GROUP) * GROUP
        self._work: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, drafter: Tensor, verifier: Tensor, rows: Tensor, token: Tensor) -> dict[str, Tensor]:
        """Columns by name of the chosen rows, on the logits' device.

        Args:
            drafter, verifier: logits [M, >=V] of any floating type.
            rows: [N] int64, which of the M rows.
            token: [N] int64, the token spoken of at each.

        Returns:
            Summary columns [N], with ``top_k`` also tails [N], ids and log-probabilities [N, K], and
            ``finite`` [N] bool: False where a logit was NaN or infinite and the row means nothing.
        """
        size = self._block_rows(drafter.device)
        parts = [
            self._block(drafter, verifier, rows[at : at + size], token[at : at + size])
            for at in range(0, len(rows), size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _block_rows(self, device: torch.device) -> int:
        return max(1, (CPU_BLOCK if device.type == "cpu" else CUDA_BLOCK) // self.width)

    def _arrays(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Work arrays for a block: logits [2, R, W], weights [2, R, W], scratch [2, R, W]."""
        size = self._block_rows(device)
        if self._work is None or self._work[0].device != device:
            shape = (2, size, self.width)
            self._work = tuple(torch.full(shape, NEVER, device=device) for _ in range(3))  # type: ignore[assignment]
        assert self._work is not None
        logits, weights, scratch = self._work
        logits[:, :, self.vocab_size :] = NEVER
        return logits[:, :count], weights[:, :count], scratch[:, :count]

    def _block(self, drafter: Tensor, verifier: Tensor, rows: Tensor, token: Tensor) -> dict[str, Tensor]:
        logits, weights, scratch = self._arrays(len(rows), drafter.device)
        for model, source in enumerate((drafter, verifier)):
            logits[model, :, : self.vocab_size] = source[:, : self.vocab_size].index_select(0, rows)
        highest, best = _max(logits)
        logits -= highest
        torch.exp(logits, out=weights)
        mass = weights.sum(dim=-1, keepdim=True)
        weights *= mass.reciprocal()
        log_mass = mass.log()
        columns = self._sums(logits, weights, scratch, log_mass, highest)
        columns |= self._places(logits, log_mass, best, token)
        columns["tv"] = self._sampled_tv(logits, columns, scratch)
        if self.top_k:
            columns |= self._candidates(logits, log_mass)
        return columns

    def _sums(
        self, logits: Tensor, weights: Tensor, scratch: Tensor, log_mass: Tensor, highest: Tensor
    ) -> dict[str, Tensor]:
        """Everything that sums over the vocabulary; log q = z - log_mass, so sum p log q = sum p z - log_mass."""
        by_row = weights.transpose(0, 1)
        means = torch.bmm(by_row, logits.permute(1, 2, 0)) - log_mass[:, :, 0].T.unsqueeze(
            1
        )  # [R, of, under]
        products = torch.bmm(by_row, by_row.transpose(1, 2))
        negentropy = means.diagonal(dim1=1, dim2=2)  # [R, 2]: sum q log q, sum p log p
        middle = _middle_log_middle(weights, scratch)
        lse = (log_mass + highest)[:, :, 0]
        return {
            "drafter_entropy": (-negentropy[:, 0]).clamp(min=0.0),
            "verifier_entropy": (-negentropy[:, 1]).clamp(min=0.0),
            "cross_entropy": -means[:, 1, 0],
            "kl": (negentropy[:, 1] - means[:, 1, 0]).clamp(min=0.0),
            "reverse_kl": (negentropy[:, 0] - means[:, 0, 1]).clamp(min=0.0),
            "js": (negentropy.sum(1) / 2 - middle / 2 + math.log(2)).clamp(0.0, math.log(2)),
            "drafter_sum_squares": products[:, 0, 0],
            "verifier_sum_squares": products[:, 1, 1],
            "product_sum": products[:, 1, 0],
            "drafter_logsumexp": lse[0],
            "verifier_logsumexp": lse[1],
            "tv_unscaled": _half_distance(weights, scratch),
            "finite": torch.isfinite(lse).all(dim=0) & torch.isfinite(means).flatten(1).all(dim=1),
        }

    def _places(self, logits: Tensor, log_mass: Tensor, best: Tensor, token: Tensor) -> dict[str, Tensor]:
        """Log-probabilities at the argmaxes and at the token."""
        ids = torch.stack([best[0], best[1], token], dim=1)
        at = logits.gather(2, ids.expand(2, -1, -1)) - log_mass  # [2, R, 3]
        at_best = at[:, :, :2].exp()
        return {
            "token": token,
            "drafter_logprob": at[0, :, 2],
            "verifier_logprob": at[1, :, 2],
            "drafter_argmax": best[0],
            "verifier_argmax": best[1],
            "drafter_max": at_best[0, :, 0],
            "verifier_max": at_best[1, :, 1],
            "drafter_at_verifier_argmax": at_best[0, :, 1],
            "verifier_at_drafter_argmax": at_best[1, :, 0],
        }

    def _sampled_tv(self, logits: Tensor, columns: dict[str, Tensor], scratch: Tensor) -> Tensor:
        if self.temperature == 1:
            return columns["tv_unscaled"]
        if self.temperature == 0:
            return (columns["drafter_argmax"] != columns["verifier_argmax"]).float()
        return _half_distance((logits / self.temperature).softmax(dim=-1), scratch)

    def _candidates(self, logits: Tensor, log_mass: Tensor) -> dict[str, Tensor]:
        """Each model's K likeliest tokens, likeliest first, what both models give them, and what is left."""
        count = logits.shape[1]
        ids = _top_ids(logits.reshape(2 * count, self.width), self.top_k).view(2, count, self.top_k)
        both = torch.cat([ids[0], ids[1]], dim=1).expand(2, -1, -1)
        logprobs = logits.gather(2, both) - log_mass  # [2, R, 2K]
        own = torch.stack([logprobs[0, :, : self.top_k], logprobs[1, :, self.top_k :]])
        tails = (1 - own.exp().sum(dim=-1)).clamp(0.0, 1.0)
        half = logprobs.half()
        return {
            "drafter_tail": tails[0],
            "verifier_tail": tails[1],
            "drafter_top_ids": ids[0].int(),
            "verifier_top_ids": ids[1].int(),
            "drafter_top_drafter_logprobs": half[0, :, : self.top_k],
            "verifier_top_drafter_logprobs": half[0, :, self.top_k :],
            "drafter_top_verifier_logprobs": half[1, :, : self.top_k],
            "verifier_top_verifier_logprobs": half[1, :, self.top_k :],
        }


def _max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Highest logit [2, R, 1] and its lowest place [2, R]."""
    highest = logits.amax(dim=-1, keepdim=True)
    if logits.device.type == "cpu":
        return highest, torch.from_numpy(np.argmax(logits.numpy(), axis=-1))  # vectorised, unlike torch's
    return highest, (logits == highest).int().argmax(dim=-1)


def _half_distance(laws: Tensor, scratch: Tensor) -> Tensor:
    """D_TV of two laws [2, R, W], clipped against rounding."""
    return (torch.sub(laws[0], laws[1], out=scratch[0]).abs_().sum(dim=-1) * 0.5).clamp(0.0, 1.0)


def _middle_log_middle(laws: Tensor, scratch: Tensor) -> Tensor:
    """sum (q + p) log(q + p), [R]; without a temporary, whose pages the kernel would have to find each time."""
    total, logs = scratch[0], scratch[1]
    torch.add(laws[0], laws[1], out=total)
    torch.clamp(total, min=TINY, out=logs)
    return logs.log_().mul_(total).sum(dim=-1)


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """Places of the k highest of each row [M, W], highest first, int64 [M, k].

    The k highest values lie in the k groups with the highest maxima: two short searches, not a long one.
    """
    groups = logits.shape[1] // GROUP
    if logits.device.type != "cpu" or groups <= 2 * k:
        return logits.topk(k, dim=1).indices
    maxima = logits.view(-1, GROUP, groups).amax(dim=1).numpy()
    chosen = np.argpartition(maxima, groups - k, axis=1)[:, groups - k :]
    members = (chosen[:, None, :] + (np.arange(GROUP) * groups)[None, :, None]).reshape(len(chosen), -1)
    values = np.take(logits.numpy().reshape(-1), members + np.arange(len(members))[:, None] * logits.shape[1])
    order = np.argsort(-values, axis=1)[:, :k]
    return torch.from_numpy(np.take_along_axis(members, order, axis=1))
